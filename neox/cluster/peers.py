"""What the ranks of several hosts compare before they begin: configuration, versions, clocks."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import neox
from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError

CLOCKS_S = 5.0  # a difference that is told
_LIBRARIES = ("torch", "deepspeed", "megatron-core")


@dataclass(frozen=True)
class Facts:
    """What one rank knows of itself. Ranks of a run differ in `host` and `clock_s` alone."""

    host: str
    configuration: str  # hash of its values
    code: str  # hash of neox's source
    versions: dict[str, str]
    clock_s: float  # seconds since the epoch


def facts(config: NeoXConfig) -> Facts:
    """This process's; `clock_s` is of now."""
    values = json.loads(config.encode())
    del values["origins"]  # a file may lie elsewhere
    text = json.dumps(values, sort_keys=True)
    code = hashlib.sha256()
    root = Path(neox.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.h"), *root.rglob("*.cpp")]):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return Facts(
        socket.gethostname(),
        hashlib.sha256(text.encode()).hexdigest()[:12],
        code.hexdigest()[:12],
        {"Python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        time.time(),
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def compare(ranks: Sequence[Facts]) -> None:
    """Raise ConfigError naming hosts and values where `ranks` differ; warn of clocks that do."""
    problems = []
    for name in ranks[0].versions:
        problems += _difference(
            name, [(rank.host, rank.versions.get(name, "none")) for rank in ranks]
        )
    code = [(rank.host, rank.code) for rank in ranks]
    problems += _difference("neox's own code (a hash of it)", code)
    configuration = [(rank.host, rank.configuration) for rank in ranks]
    problems += _difference("the configuration (a hash of its values)", configuration)
    if problems:
        raise ConfigError(
            "\n  ".join(["the hosts do not run the same thing:", *problems])
            + "\nInstall the same versions and put the same files on every host."
        )
    first, last = (choose(ranks, key=lambda rank: rank.clock_s) for choose in (min, max))
    if last.clock_s - first.clock_s > CLOCKS_S:
        log.warning(
            f"the clock of {last.host} is {last.clock_s - first.clock_s:.0f} s ahead of that of "
            f"{first.host}; times in logs and files will not agree (is NTP running?)"
        )


def _difference(what: str, values: Sequence[tuple[str, str]]) -> list[str]:
    """One line if the second of the pairs are not all equal: which hosts have which."""
    hosts: dict[str, list[str]] = {}
    for host, value in values:
        if host not in hosts.setdefault(value, []):
            hosts[value].append(host)
    if len(hosts) == 1:
        return []
    parts = [f"{value} on {', '.join(names)}" for value, names in hosts.items()]
    return [f"{what}: {'; '.join(parts)}"]


def check_peers(config: NeoXConfig) -> None:
    """Compare with all other ranks, once torch.distributed is up.

    Collective over the world; every rank raises alike.
    """
    import torch.distributed as dist

    mine = facts(config)
    dist.barrier()  # so that clocks are read at one time
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, dataclasses.replace(mine, clock_s=time.time()))
    compare(found)
