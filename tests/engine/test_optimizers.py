"""Every optimizer takes the steps of its reference, at every grid, and goes on from what it saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from neox.config import NeoXConfig
from neox.engine.optimizers import build_optimizer
from tests.models import config_of

DECAY = 0.1


def chosen(kind: str, **params: Any) -> dict[str, Any]:
    """The keys that choose an optimizer; "adam8bit" is Adam with use_bnb_optimizer."""
    bits = {"use_bnb_optimizer": True} if kind == "adam8bit" else {}
    kind = kind.removesuffix("8bit")
    return {
        "optimizer": {"type": kind, "params": {"lr": 0.01, **params}},
        "weight_decay": DECAY,
        **bits,
    }


def settings(**values: Any) -> NeoXConfig:
    return config_of(**values)


# ---- against a reference, step by step


def parameters() -> list[nn.Parameter]:
    """A matrix that 8-bit Adam quantizes, one that it leaves alone, and a bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((80, 60), (6, 7), (50,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """Six steps at different rates; one gradient is zero, and one missing."""
    generator = torch.Generator().manual_seed(2)
    for number in range(6):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        params[0].grad[3] = 0
        if number == 2:
            params[1].grad = None
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (number + 1)
        optimizer.step()


def in_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "weight_decay": DECAY},
        {"params": params[2:], "weight_decay": 0.0},
    ]


def adamw(params: list[nn.Parameter], **values: Any) -> torch.optim.Optimizer:
    values = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, **values}
    return torch.optim.AdamW(in_groups(params), foreach=False, fused=False, **values)


def adam(params: list[nn.Parameter], **values: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(in_groups(params), lr=1.0, foreach=False, fused=False, **values)


def sgd(params: list[nn.Parameter], **values: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(in_groups(params), lr=1.0, foreach=False, fused=False, **values)


def bitsandbytes(params: list[nn.Parameter], **values: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(in_groups(params), **values)


class Formula(torch.optim.Optimizer):
    """The formulas of Lion and MADGRAD, in fp64 and without anything in place."""

    def __init__(self, params: list[nn.Parameter], kind: str, **values: Any) -> None:
        super().__init__(in_groups(params), {"lr": 1.0})
        self.kind, self.values = kind, values
        self.kept: dict[nn.Parameter, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.lion if self.kind == "lion" else self.madgrad
                    kept = self.kept.setdefault(parameter, {"x": parameter.double()})
                    update(kept, parameter.grad.double(), group["lr"], group["weight_decay"])
                    parameter.copy_(kept["x"])

    def lion(self, kept: dict[str, Any], g: Tensor, lr: float, decay: float) -> None:
        beta1, beta2 = self.values["betas"]
        m = kept.get("m", torch.zeros_like(g))
        kept["x"] = kept["x"] - lr * (torch.sign(beta1 * m + (1 - beta1) * g) + decay * kept["x"])
        kept["m"] = beta2 * m + (1 - beta2) * g

    def madgrad(self, kept: dict[str, Any], g: Tensor, lr: float, decay: float) -> None:
        momentum, eps = self.values["momentum"], 1e-6
        k, v, s = kept.get("k", 0), kept.get("v", 0 * g), kept.get("s", 0 * g)
        x = kept["x"] * (1 - (lr + eps) * decay)
        # Without momentum, what is decayed is the result of dual averaging, and its origin with it.
        x0 = kept.setdefault("x0", kept["x"]) if momentum else x + s / (v ** (1 / 3) + eps)
        scale = (lr + eps) * (k + 1) ** 0.5
        kept["k"], kept["v"], kept["s"] = k + 1, v + scale * g * g, s + scale * g
        z = x0 - kept["s"] / (kept["v"] ** (1 / 3) + eps)
        kept["x"] = momentum * x + (1 - momentum) * z


@pytest.mark.parametrize(
    ("keys", "reference"),
    [
        (chosen("Adam"), adamw),
        (chosen("AdamW", betas=[0.8, 0.95], eps=1e-4), lambda p: adamw(p, betas=(0.8, 0.95), eps=1e-4)),
        (chosen("adam", adam_w_mode=False), adam),
        (chosen("cpu_adam", betas=[0.8, 0.95]), lambda p: adamw(p, betas=(0.8, 0.95))),
        (chosen("CPU_Torch_Adam"), adamw),
        (chosen("SGD"), sgd),
        (chosen("sgd", momentum=0.9), lambda p: sgd(p, momentum=0.9)),
        (chosen("sgd", momentum=0.8, nesterov=True), lambda p: sgd(p, momentum=0.8, nesterov=True)),
        (chosen("Lion"), lambda p: Formula(p, "lion", betas=(0.9, 0.99))),
        (chosen("lion", betas=[0.95, 0.98]), lambda p: Formula(p, "lion", betas=(0.95, 0.98))),
        (chosen("madgrad_wd"), lambda p: Formula(p, "madgrad", momentum=0.9)),
        (chosen("madgrad_wd", momentum=0), lambda p: Formula(p, "madgrad", momentum=0.0)),
        (chosen("adam8bit"), bitsandbytes),
        (chosen("adam8bit", betas=[0.8, 0.95]), lambda p: bitsandbytes(p, betas=(0.8, 0.95))),
    ],
    ids=lambda value: "-".join(map(str, value["optimizer"]["params"])) if isinstance(value, dict) else "",
)  # fmt: skip
def test_steps_are_those_of_the_reference(keys: dict[str, Any], reference: Any) -> None:
    ours, theirs = parameters(), parameters()
    steps(build_optimizer(config_of(**keys), ours), ours)
    steps(reference(theirs), theirs)
    for mine, other, start in zip(ours, theirs, parameters(), strict=True):
        assert (mine - start).abs().max() > 0.01
        assert_close(mine, other, atol=1e-6, rtol=1e-5)
