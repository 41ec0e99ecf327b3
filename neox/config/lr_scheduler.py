"""LRSchedulerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = key("linear", "")
    lr_decay_iters: int | None = key(None, "")
    lr_decay_fraction: float | None = key(None, "")
    min_lr: float = key(0.0, "")
    warmup: float = key(0.01, "")
    override_lr_scheduler: bool = key(False, "")
    use_checkpoint_lr_scheduler: bool = key(False, "")
