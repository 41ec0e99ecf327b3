"""RunnerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    hostfile: str | None = key(None, "")
    include: str | None = key(None, "")
    exclude: str | None = key(None, "")
    num_nodes: int = key(-1, "")
    num_gpus: int | None = key(None, "")
    master_port: int = key(29500, "")
    master_addr: str | None = key(None, "")
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm"] = key("pdsh", "")
    force_multi: bool = key(False, "")
    autotuning_run: str | None = key(None, "")
    no_ssh_check: bool = key(False, "")
    comment: str | None = key(None, "")
    account: str | None = key(None, "")
