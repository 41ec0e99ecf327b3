"""The learning rate over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import ignored, key, refused

_CLOSED_FORM = "the schedule is always this configuration's, computed from the iteration"


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """Warm-up and decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = key(
        "linear", "Shape of the decay."
    )
    lr_decay_iters: int | None = key(
        None, "Iteration at which the decay ends; train_iters by default.", low=1
    )
    lr_decay_fraction: float | None = key(
        None, "Share of train_iters at which the decay ends.", above=0, high=1
    )
    min_lr: float = key(0.0, "The rate never falls below it.", low=0)
    warmup: float = key(0.01, "Share of the decay's iterations that rise linearly.", low=0, high=1)
    override_lr_scheduler: bool = ignored(
        False, "Prefer this schedule to a checkpoint's.", _CLOSED_FORM
    )
    use_checkpoint_lr_scheduler: bool = refused(
        False,
        "Prefer a checkpoint's schedule to this one.",
        f"{_CLOSED_FORM}. Copy its keys from the configs folder of the checkpoint",
    )
