"""MADGRAD (arXiv:2101.11075) with decoupled weight decay, as upstream's madgrad_wd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MadgradWD(Optimizer):
    """Dual averaging: step k's weight follows from the first one and from sums over all steps.

        weight      = weight * (1 - rate * weight_decay)             rate = lr + eps
        lambda      = rate * sqrt(k + 1)                             k = 0, 1, ...
        grad_sum_sq = grad_sum_sq + lambda * gradient^2
        s           = s + lambda * gradient
        z           = x0 - s / (cbrt(grad_sum_sq) + eps)
        weight      = momentum * weight + (1 - momentum) * z

    x0 is the weight before step 0. Without momentum it is what the decayed weight was made from
    and is not stored, so that the decay acts on it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None, "no engine evaluates the loss again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum, eps = self.state[parameter], group["momentum"], group["eps"]
        if not state:
            state["step"] = torch.zeros(())
            state["grad_sum_sq"] = torch.zeros_like(parameter)
            state["s"] = torch.zeros_like(parameter)
        squares, total = state["grad_sum_sq"], state["s"]
        if momentum and "x0" not in state:
            state["x0"] = torch.addcdiv(parameter, total, squares.pow(1 / 3).add_(eps))
        rate = group["lr"] + eps
        scale = rate * (float(state["step"]) + 1) ** 0.5
        parameter.mul_(1 - rate * group["weight_decay"])
        if momentum:
            first = state["x0"]
        else:
            first = torch.addcdiv(parameter, total, squares.pow(1 / 3).add_(eps))
        squares.addcmul_(gradient, gradient, value=scale)
        total.add_(gradient, alpha=scale)
        average = torch.addcdiv(first, total, squares.pow(1 / 3).add_(eps), value=-1)
        parameter.mul_(momentum).add_(average, alpha=1 - momentum)
        state["step"] += 1
