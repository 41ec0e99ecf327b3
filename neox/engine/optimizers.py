"""Optimizers by NeoX's names, over parameter groups with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neox.config import NeoXConfig
from neox.engine.eight_bit import build_adam8bit
from neox.engine.lion import Lion
from neox.engine.madgrad import MadgradWD
from neox.errors import CheckpointError, ConfigError

# Kinds of state for each weight; the last of MADGRAD's is without momentum.
_KINDS: dict[str, list[set[str]]] = {
    "adam": [{"exp_avg", "exp_avg_sq"}],
    "lion": [{"exp_avg"}],
    "sgd": [{"momentum_buffer"}],
    "madgrad_wd": [{"grad_sum_sq", "s", "x0"}, {"grad_sum_sq", "s"}],
}


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Matrices decay; biases and norms (fewer than two dimensions) don't, as upstream does it.

    Empty groups are left out: DeepSpeed's ZeRO cannot flatten them.
    """
    decayed, plain = [], []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: NeoXConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """`optimizer.type` Adam is AdamW, as DeepSpeed's FusedAdam with adam_w_mode makes it upstream.

    The learning rate is set before every step; the one given here is never used. Raises ConfigError
    for what the parameters' device cannot do.
    """
    groups = parameter_groups(parameters, config.weight_decay)
    settings, kind = dict(config.optimizer_params), config.optimizer_type
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    if kind == "sgd":
        return torch.optim.SGD(groups, fused=True, **settings)
    if kind == "lion":
        return Lion(groups, **settings)
    if kind == "madgrad_wd":
        return MadgradWD(groups, **settings)
    decoupled = settings.pop("adam_w_mode")
    if config.use_bnb_optimizer:
        return build_adam8bit(groups, **settings)
    on_cuda = any(parameter.is_cuda for group in groups for parameter in _params(group))
    if kind.startswith("cpu_") and on_cuda and not _offloads(config):
        raise ConfigError(
            f"optimizer.type is {kind}, whose state is in the CPU's memory, but nothing puts it "
            "there. Set zero_optimization: {stage: 1, offload_optimizer: {device: cpu}}."
        )
    if kind == "cpu_adam" and on_cuda:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, for minutes

        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **settings)
    kinds = {True: torch.optim.AdamW, False: torch.optim.Adam}
    return kinds[decoupled](groups, fused=True, **settings)


def state_name(optimizer: Optimizer) -> str:
    """What the optimizer's state is that of, as `NeoXConfig.optimizer_state` says it."""
    names = {torch.optim.SGD: "sgd", Lion: "lion", MadgradWD: "madgrad_wd"}
    return names.get(type(optimizer), "adam")


def check_state(optimizer: Optimizer, kinds: Iterable[str]) -> None:
    """Raises CheckpointError when saved state of these kinds is another optimizer's.

    None at all goes with every optimizer: there was no step yet, or SGD without momentum.
    """
    found = set(kinds) - {"fp32"}
    name = state_name(optimizer)
    if found and found not in _KINDS[name]:
        known = [other for other, sets in _KINDS.items() if found in sets]
        whose = (
            f"that of {known[0]}"
            if known
            else f"of kinds unknown here ({', '.join(sorted(found))})"
        )
        raise CheckpointError(f"the optimizer state is {whose}, and this run's optimizer is {name}")


def step_counter(optimizer: Optimizer, parameter: Tensor, step: float) -> Tensor | int:
    """The number of steps taken as the optimizer counts them in its state."""
    if isinstance(optimizer, torch.optim.Adam | MadgradWD):  # AdamW is an Adam
        return torch.tensor(step, device=parameter.device)
    return int(step)


def _params(group: dict[str, Any]) -> list[nn.Parameter]:
    params: list[nn.Parameter] = group["params"]
    return params


def _offloads(config: NeoXConfig) -> bool:
    block = (config.zero_optimization or {}).get("offload_optimizer") or {}
    return block.get("device", "none") != "none"
