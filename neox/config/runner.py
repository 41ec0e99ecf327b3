"""Where processes run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import key, refused


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Machines, processes, and the launcher that starts them."""

    hostfile: str | None = key(
        None, "Hosts and their slots, one `host slots=N` a line (see clusters.md)."
    )
    include: str | None = key(None, "Hosts and slots to use: worker-0@worker-1:0,2.")
    exclude: str | None = key(None, "Hosts and slots not to use.")
    num_nodes: int = key(-1, "Machines to use, from the top of the hostfile; -1 uses all.", low=-1)
    num_gpus: int | None = key(
        None, "Processes on each machine: GPUs, or plain processes without CUDA.", low=1
    )
    master_port: int = key(29500, "Port on which processes meet.", low=1, high=65535)
    master_addr: str | None = key(None, "Address on which processes meet.")
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi"] = key(
        "pdsh", "Starts the processes on several machines."
    )
    force_multi: bool = key(False, "Use the several-machine launcher for one machine too.")
    no_ssh_check: bool = key(False, "Don't try ssh to the hosts before launching.")
    deepspeed_mpi: bool = key(
        False, "Accepted: processes that mpirun starts find their ranks anyway."
    )
    deepspeed_slurm: bool = key(
        False, "Accepted: processes that srun starts find their ranks anyway."
    )
    restarts: int = key(
        0, "Times that training goes on from its newest checkpoint after a failure.", low=0
    )
    watchdog_timeout: float = key(
        1800.0,
        "Seconds without progress after which training in several processes ends; 0: never.",
        low=0,
    )
    comment: str | None = key(None, "Slurm's --comment.")
    account: str | None = key(None, "Slurm's --account.")
    autotuning_run: str | None = refused(
        None, "Run DeepSpeed's autotuner.", "DeepSpeed's autotuner is not supported"
    )
