#!/usr/bin/env python3
"""Write a hostfile: of a scheduler's job, of a list of hosts, or of names.

tools/hostfile.py > hosts                          of the Slurm, LSF or PBS job around it
tools/hostfile.py a b node[01-12] --slots 8 > hosts
tools/hostfile.py --hosts /job/hosts --slots 8     a file with a name a line, or a folder with a
                                                   file for each host
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.cluster.hosts import read_lines, slurm_hosts
from neox.cluster.main import exit_status
from neox.cluster.nodelist import expand
from neox.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="HOST", nargs="*", help="hosts, also as node[01-12]")
    parser.add_argument("--hosts", type=Path, metavar="PATH", help="a file or folder of hosts")
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="GPUs, or processes, of each host (default: the job's)",
    )
    return parser


def _run(given: argparse.Namespace) -> int:
    if given.slots is not None and given.slots < 1:
        raise ConfigError(f"--slots is {given.slots}; a host has one or more")
    hosts = find_hosts(given.names, given.hosts, os.environ)
    if not hosts:
        raise ConfigError(f"{given.hosts or 'the job'} names no host")
    for host, slots in hosts.items():
        number = given.slots or slots
        if not number:
            raise ConfigError(f"nothing tells how many slots {host} has; give --slots N")
        print(f"{host} slots={number}")
    return 0


def find_hosts(
    names: Sequence[str], path: Path | None, environ: Mapping[str, str]
) -> dict[str, int]:
    """Hosts and their slots in order, 0 where nothing tells; ConfigError where no host is found."""
    if names:
        return {host: 0 for text in names for host in expand(text)}
    if path is not None:
        return _read(path)
    if (slurm := slurm_hosts(environ)) is not None:
        return {host: len(slots) for host, slots in slurm.items()}
    if "LSB_MCPU_HOSTS" in environ:  # host n host n
        words = environ["LSB_MCPU_HOSTS"].split()
        return {host: int(n) for host, n in zip(words[::2], words[1::2], strict=True)}
    for variable in ("LSB_DJOB_HOSTFILE", "PBS_NODEFILE"):  # a line for each slot
        if variable in environ:
            lines = read_lines(Path(environ[variable]))
            return Counter(line.strip() for line in lines if line.strip())
    raise ConfigError(
        "no job of Slurm's, LSF's or PBS's is around this, and no host is named; "
        "try: tools/hostfile.py node[01-04] --slots 8"
    )


def _read(path: Path) -> dict[str, int]:
    if path.is_dir():  # Kubernetes mounts a file for each; it keeps its own behind names with dots
        return {file.name: 0 for file in sorted(path.iterdir()) if not file.name.startswith("..")}
    if not path.is_file():
        raise ConfigError(f"--hosts {path} is neither a file nor a folder")
    lines = [line.partition("#")[0].split() for line in read_lines(path)]
    return {host: 0 for words in lines if words for host in expand(words[0])}


if __name__ == "__main__":
    sys.exit(main())
