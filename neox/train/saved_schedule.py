"""A resumed run's schedule: the configuration's, or the one that was saved with the checkpoint.

A checkpoint tells its schedule under upstream's name and in upstream's form, so that either program
reads the other's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from neox import log
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file, model_file
from neox.config import NeoXConfig
from neox.config.fields import keys_of
from neox.config.lr_scheduler import LRSchedulerConfig
from neox.config.values import Misfit, fit, listed
from neox.errors import CheckpointError
from neox.train.schedule import decay_iterations

SAVED = "lr_scheduler"  # in the mp_rank files
_WSD = ("wsd_decay_ratio", "wsd_decay_style")


def schedule_state(config: NeoXConfig, iteration: int) -> dict[str, Any]:
    """The schedule as upstream's AnnealingLR saves it after `iteration` steps."""
    state = {
        "start_lr": config.lr,
        "warmup_iter": config.warmup * decay_iterations(config),
        "num_iters": iteration,
        "decay_style": config.lr_decay_style,
        "end_iter": decay_iterations(config),
        "min_lr": config.min_lr,
    }
    if config.lr_decay_style == "wsd":
        state |= {name: getattr(config, name) for name in _WSD}
    return state


def settle_schedule(
    config: NeoXConfig, checkpoint: Checkpoint | None, *, with_optimizer: bool
) -> NeoXConfig:
    """The configuration with the schedule that a run from `checkpoint` follows.

    That is the configuration's own, unless use_checkpoint_lr_scheduler is true. Where the
    checkpoint's is another, a line says so: a warning, unless override_lr_scheduler is true. A run
    that starts anew from the weights, by `finetune`, has no other; one that drops the optimizer's
    state is not compared. Not collective; every rank must call. Raises CheckpointError.
    """
    if checkpoint is None or config.finetune:
        return config
    if not (with_optimizer or config.use_checkpoint_lr_scheduler):
        return config
    path = model_file(checkpoint.folder, 0)
    saved = load_model_file(path).get(SAVED) if path.is_file() else None
    if not saved:
        if config.use_checkpoint_lr_scheduler:
            raise CheckpointError(
                f"use_checkpoint_lr_scheduler is true, but {checkpoint.folder} holds no schedule. "
                "Leave it out to follow the configuration's."
            )
        return config
    try:
        theirs = _keys(saved)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, Misfit) as error:
        unread = f"{path}: its learning-rate schedule cannot be read ({error})"
        if config.use_checkpoint_lr_scheduler:
            advice = "Leave use_checkpoint_lr_scheduler out to follow the configuration's."
            raise CheckpointError(f"{unread}. {advice}") from error
        log.warning(f"{unread}; this run follows the configuration's")
        return config
    ours = _ours(config, theirs)
    differing = [name for name, value in theirs.items() if not _equal(value, ours[name])]
    if not differing:
        return config
    there, here = (_told(values, differing) for values in (theirs, ours))
    if config.use_checkpoint_lr_scheduler:
        log.info(f"the schedule is the checkpoint's: {there} (the configuration's: {here})")
        origins = dict(config.origins) | dict.fromkeys(theirs, "checkpoint")
        return dataclasses.replace(config, **theirs, lr_decay_fraction=None, origins=origins)
    if config.override_lr_scheduler:
        log.info(f"override_lr_scheduler: {here}, while the checkpoint's schedule has {there}")
    else:
        log.warning(
            f"the checkpoint's schedule has {there}, but this run follows the configuration's: "
            f"{here}. Set use_checkpoint_lr_scheduler: true to follow the checkpoint's, or "
            "override_lr_scheduler: true if the change is meant."
        )
    return config


def _keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the configuration that make the saved schedule. ValueError, Misfit and such."""
    end = int(saved["end_iter"])
    values = {
        "min_lr": float(saved["min_lr"]),
        "warmup": _fraction(float(saved["warmup_iter"]), end),
        "lr_decay_iters": end,
        "lr_decay_style": saved["decay_style"],
    }
    values |= {name: saved[name] for name in _WSD if name in saved}
    keys = keys_of(LRSchedulerConfig)
    fitting = {name: fit(value, keys[name]) for name, value in values.items()}
    return {"lr": float(saved["start_lr"])} | fitting


def _fraction(part: float, whole: int) -> float:
    """The share of `whole` that `part` is: the one whose product with it is `part` exactly."""
    share = part / whole
    near = (share, math.nextafter(share, 0), math.nextafter(share, math.inf))
    return next((candidate for candidate in near if candidate * whole == part), share)


def _ours(config: NeoXConfig, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in names}
    return values | {"lr_decay_iters": decay_iterations(config)}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def _told(values: Mapping[str, Any], names: list[str]) -> str:
    return listed((f"{name} {values[name]}" for name in names), "and")
