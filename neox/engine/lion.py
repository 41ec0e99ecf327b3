"""Lion, as arXiv:2302.06675 describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Every weight moves by the learning rate; the sign is that of a mean of momentum and gradient.

        update = sign(beta1 * m + (1 - beta1) * gradient)
        weight = weight * (1 - lr * weight_decay) - lr * update
        m      = beta2 * m + (1 - beta2) * gradient

    Its state is m alone, `exp_avg`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None, "no engine evaluates the loss again"
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                update = momentum.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
                parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)
