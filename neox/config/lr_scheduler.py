"""The learning rate over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import key


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """Warm-up and decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd"] = key(
        "linear", "Shape of the decay; wsd is warm-up, stable, decay."
    )
    wsd_decay_ratio: float = key(
        0.1, "wsd: share of the decay's iterations, the last ones, that fall.", above=0, high=1
    )
    wsd_decay_style: Literal["cosine", "linear", "minus_sqrt"] = key(
        "cosine", "wsd: how the rate falls to min_lr; minus_sqrt is 1 - sqrt(x)."
    )
    lr_decay_iters: int | None = key(
        None, "Iteration at which the decay ends; train_iters by default.", low=1
    )
    lr_decay_fraction: float | None = key(
        None, "Share of train_iters at which the decay ends.", above=0, high=1
    )
    min_lr: float = key(0.0, "The rate never falls below it.", low=0)
    warmup: float = key(0.01, "Share of the decay's iterations that rise linearly.", low=0, high=1)
    override_lr_scheduler: bool = key(
        False, "A resumed run follows this schedule, where the checkpoint's is another."
    )
    use_checkpoint_lr_scheduler: bool = key(
        False, "A resumed run follows the schedule that was saved with the checkpoint."
    )
