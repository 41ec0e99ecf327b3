"""The learning rate as a pure function of the step: nothing is stored, so nothing can drift.

Two questions are asked of one curve f = `learning_rate`. NeoX moves its scheduler after the
optimizer, so iteration k (counted from 1) is made with f(k - 1) and leaves f(k) behind, which is
the rate that its log line shows:

    iteration k uses     rate_used(config, k)     = f(k - 1),  with f(0) = f(1)
    iteration k reports  rate_reported(config, k) = f(k)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from neox.config import NeoXConfig


def learning_rate(config: NeoXConfig, step: int) -> float:
    """f(step): the rate after `step` iterations.

    It rises linearly over the first `warmup` (a fraction) of the decay's iterations, then follows
    `lr_decay_style` down. Linear and cosine arrive at the last decay iteration and stay at
    `min_lr` from there on; so does wsd, which keeps the peak until the last `wsd_decay_ratio` of
    the decay's iterations. Exponential halves over the decay and keeps halving; no style ever goes
    below `min_lr`. Step 0 counts as step 1: a rate of zero would waste the first iteration.
    """
    peak, floor = config.lr, config.min_lr
    step = max(step, 1)
    total = decay_iterations(config)
    warmup = config.warmup * total  # need not be whole
    if step <= warmup:
        return peak * step / warmup

    length = max(total - warmup, 1.0)  # warmup: 1.0 leaves nothing to decay over
    elapsed = step - warmup
    until_end = min(elapsed, length)
    if config.lr_decay_style == "linear":
        rate = peak * (length - until_end) / length
    elif config.lr_decay_style == "cosine":
        rate = floor + (peak - floor) / 2 * (1 + math.cos(math.pi * until_end / length))
    elif config.lr_decay_style == "exponential":
        rate = peak * math.exp(-0.693 * elapsed / length)  # 0.693: ln 2 as NeoX rounds it
    elif config.lr_decay_style == "wsd":
        falling = config.wsd_decay_ratio * total
        share = min(max(step - (total - falling), 0.0) / falling, 1.0)
        rate = floor + (peak - floor) * _REMAINS[config.wsd_decay_style](share)
    else:
        assert config.lr_decay_style == "constant", config.lr_decay_style
        rate = peak
    return max(rate, floor)


# What remains of the way from the peak to min_lr after a share of wsd's fall.
_REMAINS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}


def rate_used(config: NeoXConfig, iteration: int) -> float:
    """The rate the optimizer applies in iteration `iteration` (from 1)."""
    return learning_rate(config, iteration - 1)


def rate_reported(config: NeoXConfig, iteration: int) -> float:
    """The rate that the log shows for iteration `iteration` (from 1)."""
    return learning_rate(config, iteration)


def decay_iterations(config: NeoXConfig) -> int:
    """Where the decay ends: lr_decay_iters, or lr_decay_fraction of train_iters, or train_iters."""
    if config.lr_decay_iters is not None:
        iterations = config.lr_decay_iters
    elif config.lr_decay_fraction is not None:
        iterations = math.floor(config.train_iters * config.lr_decay_fraction)
    else:
        iterations = config.train_iters
    return max(iterations, 1)
