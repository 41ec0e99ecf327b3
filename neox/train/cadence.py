"""When to save: `checkpoint_factor`, `checkpoint_scale`, `extra_save_iters`, and the end."""

from __future__ import annotations

from neox.config import NeoXConfig


def is_save_iteration(config: NeoXConfig, iteration: int) -> bool:
    """Whether a checkpoint is due once `iteration` steps are done."""
    if config.save is None:
        return False
    if iteration == config.train_iters or iteration in (config.extra_save_iters or ()):
        return True
    factor = config.checkpoint_factor
    if factor is None or iteration == 0:
        return False
    if config.checkpoint_scale == "linear":
        return iteration % int(factor) == 0
    return _is_rounded_power(iteration, factor)


def _is_rounded_power(iteration: int, factor: float) -> bool:
    """Whether `iteration` is a power of `factor`, rounded down: 1, 2, 4, 8 ... for 2."""
    power = 1.0
    while int(power) < iteration:
        power *= factor
    return int(power) == iteration
