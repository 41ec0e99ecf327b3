"""DeepSpeedConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    deepspeed: bool = key(True, "")
    train_batch_size: int = key(None, "")
    train_micro_batch_size_per_gpu: int = key(None, "")
    gradient_accumulation_steps: int = key(1, "")
    optimizer: dict | None = key(None, "")
    scheduler: dict | None = key(None, "")
    fp32_allreduce: bool = key(False, "")
    prescale_gradients: bool = key(False, "")
    gradient_predivide_factor: float = key(1.0, "")
    sparse_gradients: bool = key(False, "")
    fp16: dict | None = key(None, "")
    bf16: dict | None = key(None, "")
    amp: dict | None = key(None, "")
    gradient_clipping: float = key(1.0, "")
    zero_optimization: dict | None = key(None, "")
    curriculum_learning: dict | None = key(None, "")
    curriculum_seqlen: int = key(0, "")
    steps_per_print: int = key(10, "")
    wall_clock_breakdown: bool = key(False, "")
    dump_state: bool = key(False, "")
    flops_profiler: dict | None = key(None, "")
    communication_data_type: bool | None = key(None, "")
    autotuning: dict | None = key(None, "")
    activation_checkpointing: dict | None = key(None, "")
    sparse_attention: dict | None = key(None, "")
    data_efficiency: dict | None = key(None, "")
    tensorboard: dict | None = key(None, "")
    wandb: dict | None = key(None, "")
    csv_monitor: dict | None = key(None, "")
    elasticity: dict | None = key(None, "")
    comms_logger: dict | None = key(None, "")
    compression_training: dict | None = key(None, "")
    checkpoint: dict | None = key(None, "")
    data_types: dict | None = key(None, "")
    deepspeed_extra_args: dict | None = key(None, "")
