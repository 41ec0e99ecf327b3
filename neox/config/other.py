"""OtherConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class OtherConfig:
    distributed_backend: str = key("nccl", "")
    local_rank: int | None = key(None, "")
    rank: int | None = key(None, "")
    lazy_mpu_init: bool = key(False, "")
    short_seq_prob: float = key(0.1, "")
    eod_mask_loss: bool = key(False, "")
    adlr_autoresume: bool = key(False, "")
    adlr_autoresume_interval: int = key(1000, "")
    seed: int = key(1234, "")
    deepscale: bool = key(False, "")
    deepscale_config: str | None = key(None, "")
    deepspeed_mpi: bool = key(False, "")
    deepspeed_slurm: bool = key(False, "")
    user_script: str | None = key(None, "")
    iteration: int | None = key(None, "")
    do_train: bool | None = key(None, "")
    do_valid: bool | None = key(None, "")
    do_test: bool | None = key(None, "")
    global_num_gpus: int | None = key(None, "")
