"""Seed, backend, checkpoint iteration, and what the launcher tells each process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import derived, ignored, key

_AUTORESUME = "it belongs to a cluster of NVIDIA's own"
_RANK = "the launcher tells each process"
_SPLITS = "train_iters, eval_iters and split decide it"


@dataclass(frozen=True, kw_only=True)
class OtherConfig:
    """What has no section of its own."""

    seed: int = key(
        1234, "Seed of weights, data order, dropout and sampling.", low=0, high=2**32 - 1
    )
    distributed_backend: Literal["nccl", "gloo"] = key(
        "nccl", "Communication between processes; without CUDA, nccl becomes gloo."
    )
    iteration: int | None = key(
        None, "Iteration of the checkpoint to load; the latest by default.", low=0
    )
    local_rank: int | None = derived(None, "Process number on its machine.", _RANK)
    rank: int | None = derived(None, "Process number.", _RANK)
    global_num_gpus: int | None = derived(
        None, "Processes of the run.", "the launcher counts the processes"
    )
    user_script: str | None = derived(None, "Script that runs.", "the command line names it")
    do_train: bool | None = derived(None, "Whether there is training data.", _SPLITS)
    do_valid: bool | None = derived(None, "Whether there is validation data.", _SPLITS)
    do_test: bool | None = derived(None, "Whether there is test data.", _SPLITS)
    lazy_mpu_init: bool = ignored(
        False, "Let other code set up communication.", "communication is always set up here"
    )
    short_seq_prob: float = ignored(0.1, "Left over from BERT.", "nothing reads it (nor upstream)")
    adlr_autoresume: bool = ignored(False, "Resume on a cluster of NVIDIA's.", _AUTORESUME)
    adlr_autoresume_interval: int = ignored(1000, "Iterations between checks.", _AUTORESUME)
    deepscale: bool = ignored(False, "DeepSpeed's former name.", "deepspeed replaced it")
    deepscale_config: str | None = ignored(
        None, "DeepSpeed's former name.", "deepspeed replaced it"
    )
