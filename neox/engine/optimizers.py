"""Optimizers by NeoX's names, over parameter groups with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from neox.config import NeoXConfig


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


def build_optimizer(
    config: NeoXConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """`optimizer.type` Adam is AdamW, as DeepSpeed's FusedAdam with adam_w_mode makes it upstream.

    The learning rate is set before every step; the one given here is never used.
    """
    groups = parameter_groups(parameters, config.weight_decay)
    params = config.optimizer_params
    kind = config.optimizer_type
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=params["lr"], momentum=params.get("momentum", 0.0))
    assert kind == "adam", f"optimizer {kind} passed the configuration's check"
    beta1, beta2 = params["betas"]
    return torch.optim.AdamW(
        groups, lr=params["lr"], betas=(beta1, beta2), eps=params["eps"], fused=True
    )
