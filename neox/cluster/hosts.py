"""Which hosts and which of their slots a run uses. A slot is a GPU, or a process on a CPU."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from neox.cluster.nodelist import counts, expand
from neox.config import NeoXConfig
from neox.errors import ConfigError

LOOPBACK = {"localhost", "127.0.0.1"}
Slots = dict[str, list[int]]  # host name -> slot numbers, in the order ranks are given out

# What exists where a driver of NVIDIA's, of NVIDIA's under Windows, or of AMD's is loaded.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def cuda_driver() -> bool:
    """Whether this machine may have a CUDA device at all."""
    return any(Path(driver).exists() for driver in DRIVERS)


def cuda_devices() -> list[int]:
    """The numbers of this machine's visible CUDA devices, [] without any.

    torch is asked, and imported for it, only where a driver is loaded.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or not cuda_driver():
        return []
    import torch

    count = torch.cuda.device_count()
    if visible is None or count == 0:
        return list(range(count))
    numbers = visible.split(",")[:count]
    if not all(number.strip().isdigit() for number in numbers):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible}: the launcher hands out devices by number; "
            "use the numbers that nvidia-smi -L shows"
        )
    return [int(number) for number in numbers]


def cores() -> int:
    """The CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_hostfile(config: NeoXConfig) -> Path | None:
    """The hostfile of the configuration, of DLTS_HOSTFILE, or DeepSpeed's /job/hostfile."""
    named = config.hostfile or os.environ.get("DLTS_HOSTFILE")
    path = Path(named or "/job/hostfile")
    if path.is_file():
        return path
    if config.hostfile:
        raise ConfigError(
            f"hostfile {path} ({config.origin('hostfile')}) is not a file; name another with -H, "
            "or run on this machine alone with --set hostfile=null"
        )
    if named:
        raise ConfigError(f"hostfile {path} (DLTS_HOSTFILE) is not a file; unset DLTS_HOSTFILE")
    return None


def own_names() -> set[str]:
    """The names under which a hostfile may mean this machine."""
    name = socket.gethostname()
    return {*LOOPBACK, name, name.partition(".")[0]}


def slurm_hosts(environ: Mapping[str, str]) -> Slots | None:
    """The hosts of the Slurm job around us, None outside of one.

    A host has as many slots as GPUs (--gpus-per-node, --gres), or else tasks (--ntasks-per-node).
    Raises ConfigError for variables that do not fit each other.
    """
    if "SLURM_JOB_NODELIST" not in environ:
        return None
    names = expand(environ["SLURM_JOB_NODELIST"])
    gpus = environ.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]  # 8 or a100:8
    gpus = gpus or environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and int(gpus):
        slots = [int(gpus)] * len(names)
    else:
        tasks = environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")
        slots = counts(tasks)
        if len(slots) != len(names):  # as in a shell that is a step of the job
            raise ConfigError(
                f"SLURM_TASKS_PER_NODE is {tasks}, which is not of the {len(names)} hosts of "
                f"SLURM_JOB_NODELIST, {environ['SLURM_JOB_NODELIST']}; ask Slurm for "
                "--gpus-per-node, or name the hosts with -H"
            )
    return {name: list(range(n)) for name, n in zip(names, slots, strict=True)}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of the user's. Raises ConfigError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None


# Launchers would take other letters for an option, a list, a port, or a command of the shell.
_HOST = re.compile(r"[\w.:][\w.:-]*")


def read_hostfile(path: Path) -> Slots:
    """Parse lines of `host slots=N`; # starts a comment."""
    hosts: Slots = {}
    for number, line in enumerate(read_lines(path), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,4})", text)
        if match is None:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not of the form 'host slots=N', N up to 9999"
            )
        host, slots = match[1], int(match[2])
        if _HOST.fullmatch(host) is None:
            raise ConfigError(
                f"{path}:{number}: {host!r} is not the name or address of one host "
                "(tools/hostfile.py writes node[01-12] out; users and ports go into ~/.ssh/config)"
            )
        if host in hosts:
            raise ConfigError(f"{path}:{number}: host {host} is listed twice")
        hosts[host] = list(range(slots))
    if not any(hosts.values()):
        raise ConfigError(f"{path} lists no slots; write one 'host slots=N' a line")
    return hosts


def select(
    hosts: Mapping[str, list[int]],
    config: NeoXConfig,
    advice: str = "CUDA_VISIBLE_DEVICES= (empty) in front of the command runs it on the CPU",
) -> Slots:
    """What include or exclude, else num_nodes and num_gpus (per host), leave of `hosts`.

    Raises ConfigError for what is not there; `advice` is what to do about too few slots.
    """
    hosts = {host: slots for host, slots in hosts.items() if slots}  # others can have no rank
    if config.include:
        wanted = _parse_filter("include", config.include, hosts)
        return {host: wanted[host] for host in hosts if host in wanted}
    if config.exclude:
        unwanted = _parse_filter("exclude", config.exclude, hosts)
        left = {
            host: [slot for slot in slots if slot not in unwanted.get(host, [])]
            for host, slots in hosts.items()
        }
        if not any(left.values()):
            raise ConfigError(f"exclude: {config.exclude} leaves nothing to run on")
        return {host: slots for host, slots in left.items() if slots}
    if config.num_nodes > len(hosts):
        raise ConfigError(
            f"num_nodes is {config.num_nodes}, but there are {len(hosts)} hosts: {', '.join(hosts)}"
        )
    names = list(hosts)[: config.num_nodes] if config.num_nodes > 0 else list(hosts)
    for host in names:
        if (config.num_gpus or 0) > len(hosts[host]):
            raise ConfigError(
                f"num_gpus is {config.num_gpus}, but {host} has {len(hosts[host])}; " + advice
            )
    return {host: hosts[host][: config.num_gpus or None] for host in names}


def _parse_filter(key: str, text: str, hosts: Mapping[str, list[int]]) -> Slots:
    """`host[:slot,slot...][@host...]`, DeepSpeed's notation; a host alone means all its slots."""
    found: Slots = {}
    for part in text.split("@"):
        host, _, slots = part.partition(":")
        if host not in hosts:
            raise ConfigError(
                f"{key}: {text}: there is no host {host}; there are {', '.join(hosts)}"
            )
        try:
            numbers = [int(slot) for slot in slots.split(",")] if slots else hosts[host]
        except ValueError:
            raise ConfigError(f"{key}: {text}: slots are numbers, as in {host}:0,1") from None
        missing = set(numbers) - set(hosts[host])
        if missing:
            raise ConfigError(
                f"{key}: {text}: {host} has no slot {min(missing)}; its slots are {hosts[host]}"
            )
        found[host] = sorted(set(numbers))
    return found
