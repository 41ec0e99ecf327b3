"""Keys of the optimizer and of the learning rate that must agree."""

from __future__ import annotations

from neox.config.checks import Checks, Findings
from neox.config.config import NeoXConfig

CHECKS = Checks()


@CHECKS.reading("lr", "min_lr", "optimizer")
def _floor_below_peak(config: NeoXConfig) -> Findings:
    if config.origin("lr") != "default" and config.min_lr > config.lr:
        yield (
            "min_lr",
            f"min_lr is {config.min_lr:g}, but it is above the peak, optimizer.params.lr "
            f"({config.lr:g}). Use {config.lr / 10:g}, a tenth of the peak, or anything below it.",
        )


@CHECKS.reading("optimizer", "optimizer_type", "use_bnb_optimizer")
def _optimizer_is_one(config: NeoXConfig) -> Findings:
    params, kind = config.optimizer_params, config.optimizer_type
    if config.use_bnb_optimizer and kind != "adam":
        yield (
            "use_bnb_optimizer",
            f"use_bnb_optimizer is true, but the optimizer is {kind}, and only adam has 8-bit "
            "state. Drop one of them.",
        )
    elif config.use_bnb_optimizer and not params["adam_w_mode"]:
        yield (
            "optimizer.params.adam_w_mode",
            "optimizer.params.adam_w_mode is false, but use_bnb_optimizer is true, and "
            "bitsandbytes' Adam decays the weights themselves. Drop one of them.",
        )
    if params.get("nesterov") and not params["momentum"]:
        yield (
            "optimizer.params.nesterov",
            "optimizer.params.nesterov is true, but optimizer.params.momentum is 0. Give a "
            "momentum, such as 0.9.",
        )


@CHECKS.reading("override_lr_scheduler", "use_checkpoint_lr_scheduler")
def _one_schedule_on_resume(config: NeoXConfig) -> Findings:
    if config.override_lr_scheduler and config.use_checkpoint_lr_scheduler:
        yield (
            "use_checkpoint_lr_scheduler",
            "use_checkpoint_lr_scheduler is true, which takes the checkpoint's schedule, but "
            "override_lr_scheduler is true, which takes this one. Keep one of them.",
        )


@CHECKS.reading("lr_decay_style", "warmup", "wsd_decay_ratio")
def _warmup_leaves_the_decay(config: NeoXConfig) -> Findings:
    warmup, ratio = config.warmup, config.wsd_decay_ratio
    if config.lr_decay_style == "wsd" and warmup + ratio > 1 + 1e-9:
        yield (
            "wsd_decay_ratio",
            f"wsd_decay_ratio is {ratio:g}, but warmup is {warmup:g}: together they take more than "
            "all iterations. Lower one of them.",
        )
