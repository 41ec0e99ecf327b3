"""Every optimizer takes its reference's steps, at every grid, and goes on from what it saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from neox.engine.optimizers import build_optimizer
from neox.errors import CheckpointError, ConfigError
from neox.parallel.topology import Topology
from tests.engine.test_elastic import (
    BEFORE,
    ONE,
    ZERO_0,
    ZERO_1,
    engine_of,
    go_on,
    start,
    whole_state,
)
from tests.engine.test_grids import batches
from tests.engine.test_resume import run as run_and_resume
from tests.models import config_of
from tests.world import World

DECAY = 0.1
# The threshold: the test model's weights are too small to be spread otherwise.
ZERO_3 = {
    "pipe_parallel_size": 0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def chosen(kind: str, **params: Any) -> dict[str, Any]:
    """The keys that choose an optimizer; "adam8bit" is Adam with use_bnb_optimizer."""
    bits = {"use_bnb_optimizer": True} if kind == "adam8bit" else {}
    kind = kind.removesuffix("8bit")
    return {
        "optimizer": {"type": kind, "params": {"lr": 0.01, **params}},
        "weight_decay": DECAY,
        **bits,
    }


# ---- against a reference, step by step


def parameters() -> list[nn.Parameter]:
    """A matrix that 8-bit Adam quantizes, one that it leaves alone, and a bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((80, 60), (6, 7), (50,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
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


def adamw(params: list[nn.Parameter], **values: Any) -> Optimizer:
    values = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, **values}
    return torch.optim.AdamW(in_groups(params), foreach=False, fused=False, **values)


def adam(params: list[nn.Parameter], **values: Any) -> Optimizer:
    return torch.optim.Adam(in_groups(params), lr=1.0, foreach=False, fused=False, **values)


def sgd(params: list[nn.Parameter], **values: Any) -> Optimizer:
    return torch.optim.SGD(in_groups(params), lr=1.0, foreach=False, fused=False, **values)


def bitsandbytes(params: list[nn.Parameter], **values: Any) -> Optimizer:
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(in_groups(params), **values)


class Formula(Optimizer):
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


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[list[nn.Parameter]], Optimizer]]] = {
    "adam": (chosen("Adam"), adamw),
    "adamw": (
        chosen("AdamW", betas=[0.8, 0.95], eps=1e-4),
        partial(adamw, betas=(0.8, 0.95), eps=1e-4),
    ),
    "adam_l2": (chosen("adam", adam_w_mode=False), adam),
    "cpu_adam": (chosen("cpu_adam", betas=[0.8, 0.95]), partial(adamw, betas=(0.8, 0.95))),
    "cpu_torch_adam": (chosen("CPU_Torch_Adam"), adamw),
    "sgd": (chosen("SGD"), sgd),
    "momentum": (chosen("sgd", momentum=0.9), partial(sgd, momentum=0.9)),
    "nesterov": (
        chosen("sgd", momentum=0.8, nesterov=True),
        partial(sgd, momentum=0.8, nesterov=True),
    ),
    "lion": (chosen("Lion"), partial(Formula, kind="lion", betas=(0.9, 0.99))),
    "lion_betas": (
        chosen("lion", betas=[0.95, 0.98]),
        partial(Formula, kind="lion", betas=(0.95, 0.98)),
    ),
    "madgrad": (chosen("madgrad_wd"), partial(Formula, kind="madgrad", momentum=0.9)),
    "madgrad_0": (chosen("madgrad_wd", momentum=0), partial(Formula, kind="madgrad", momentum=0.0)),
    "adam8bit": (chosen("adam8bit"), bitsandbytes),
    "adam8bit_betas": (
        chosen("adam8bit", betas=[0.8, 0.95]),
        partial(bitsandbytes, betas=(0.8, 0.95)),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_reference(name: str) -> None:
    keys, reference = REFERENCES[name]
    ours, theirs = parameters(), parameters()
    steps(build_optimizer(config_of(**keys), ours), ours)
    steps(reference(theirs), theirs)
    for mine, other, first in zip(ours, theirs, parameters(), strict=True):
        assert (mine - first).abs().max() > 0.01
        assert_close(mine, other, atol=1e-6, rtol=1e-5)


def train_beside(rank: int, name: str) -> list[tuple[Tensor, Tensor]]:
    """Train, and hand the clipped gradients to the reference too: (ours, its) weights."""
    keys, reference = REFERENCES[name]
    engine, config, groups = engine_of(ONE, {**keys, **ZERO_0})
    optimizer = engine.inner.optimizer
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    twins = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in ours}
    theirs = reference(list(twins.values()))
    theirs.param_groups.clear()
    for group in optimizer.param_groups:
        weight_decay = DECAY if group["params"][0].dim() >= 2 else 0.0
        params = [twins[parameter] for parameter in group["params"]]
        theirs.add_param_group({"params": params, "weight_decay": weight_decay})

    def follow(*_: object) -> None:
        for parameter, twin in twins.items():
            twin.grad = parameter.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = 0.01 * iteration
        theirs.step()

    optimizer.register_step_pre_hook(follow)
    source = batches(config, groups)
    for iteration in range(1, 4):
        engine.train_batch(source, iteration, 0.01 * iteration)
    return [(mine.detach(), other.detach()) for mine, other in twins.items()]


@pytest.mark.parametrize("name", ["adam", "adam_l2", "nesterov", "lion", "madgrad", "adam8bit"])
def test_training_takes_them_at_the_schedules_rate(world: World, name: str) -> None:
    (weights,) = world.run(1, train_beside, name)
    assert len(weights) > 20
    for ours, its in weights:
        assert_close(ours, its, atol=1e-6, rtol=1e-5)


# ---- at other grids, and resumed

# 8-bit Adam rounds a moment by 2 to 4 % of itself, root mean square, while it is within a hundredth
# of the largest of its block. Where blocks lie differently, so do the roundings, and two steps
# differ by about 3.5 % of the rate, in random directions: against a gradient of norm 1, the loss of
# the next step by 0.035 * rate, and after n steps by sqrt(n) times that. Allowed is twice as much.
RATE, STEPS = 0.01, 8
TOLERANCE = {"adam8bit": 0.07 * RATE * STEPS**0.5}
ELSEWHERE = ["cpu_adam", "adam_l2", "nesterov", "lion", "madgrad", "madgrad_0", "adam8bit"]


def _stage(values: dict[str, Any]) -> int:
    stage: int = values["zero_optimization"]["stage"]
    return stage


def losses(rank: int, topology: Topology, values: dict[str, Any]) -> list[float]:
    engine, config, groups = engine_of(topology, values)
    source = batches(config, groups)
    return [engine.train_batch(source, i, RATE).loss for i in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_replicas_that_share_the_state_train_alike(world: World, name: str) -> None:
    keys, _ = REFERENCES[name]
    (alone,) = world.run(1, losses, ONE, {**keys, **ZERO_0})
    both = world.run(2, losses, Topology(dp=2), {**keys, **ZERO_1})
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, abs=TOLERANCE.get(name, 1e-5))
    assert len(set(alone)) == STEPS


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        *((name, zero) for name in ELSEWHERE[1:] for zero in (ZERO_0, ZERO_1)),
        *((name, ZERO_3) for name in ("lion", "adam8bit")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"zero{_stage(value)}",
)
def test_a_resumed_run_is_the_uninterrupted_one(
    world: World, tmp_path: Path, name: str, zero: dict[str, Any]
) -> None:
    keys, _ = REFERENCES[name]
    topology = ONE if zero == ZERO_0 else Topology(dp=2)
    arguments = (topology, {**keys, **zero}, str(tmp_path / "global_step2"))
    world.run(topology.world_size, run_and_resume, *arguments)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((Topology(dp=2), ZERO_1), (ONE, ZERO_1)),
        ((ONE, ZERO_0), (Topology(tp=2, pp=2), ZERO_1)),
        ((Topology(tp=2), ZERO_1), (Topology(pp=2), ZERO_0)),
        ((Topology(dp=2), ZERO_3), (Topology(tp=2), ZERO_0)),
        ((ONE, ZERO_1), (Topology(dp=2), ZERO_3)),
    ],
    ids=["zero1", "zero0to1", "zero1to0", "zero3to0", "zero1to3"],
)
def test_8_bit_state_is_quantized_anew_for_another_grid(
    world: World, tmp_path: Path, source: tuple[Topology, Any], target: tuple[Topology, Any]
) -> None:
    keys, _ = REFERENCES["adam8bit"]
    resumed(world, tmp_path, (source[0], {**keys, **source[1]}), (target[0], {**keys, **target[1]}))


@pytest.mark.parametrize("zero", [ZERO_0, ZERO_1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("first", ["adam", "adam8bit"])
def test_adam_goes_on_with_fewer_bits_or_more(
    world: World, tmp_path: Path, first: str, zero: dict[str, Any]
) -> None:
    second = {"adam": "adam8bit", "adam8bit": "adam"}[first]
    source, target = ((ONE, {**REFERENCES[name][0], **zero}) for name in (first, second))
    resumed(world, tmp_path, source, target)


def resumed(
    world: World,
    tmp_path: Path,
    source: tuple[Topology, dict[str, Any]],
    target: tuple[Topology, dict[str, Any]],
) -> None:
    folder, again = tmp_path / f"global_step{BEFORE}", tmp_path / "again"
    expected = world.run(source[0].world_size, start, *source, str(folder), STEPS)[0]
    got = world.run(target[0].world_size, go_on, *target, str(folder), str(again), STEPS)[0]
    assert got == pytest.approx(expected, abs=TOLERANCE["adam8bit"])
    before, after = whole_state(folder, {}), whole_state(again, {})
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith((".fp32", ".step")):
            assert torch.equal(after[name], tensor), name
        else:  # each number is rounded once more, in a block with other large ones
            assert (after[name] - tensor).norm() <= 0.07 * tensor.norm(), name


@pytest.mark.parametrize("zero", [ZERO_0, ZERO_1], ids=["zero0", "zero1"])
def test_another_optimizers_state_is_refused(
    world: World, tmp_path: Path, zero: dict[str, Any]
) -> None:
    folder = tmp_path / f"global_step{BEFORE}"
    world.run(1, start, ONE, {**REFERENCES["lion"][0], **zero}, str(folder), 0)
    wanted = "the optimizer state is that of lion, and this run's optimizer is adam.*no_load_optim"
    with pytest.raises(CheckpointError, match=wanted):
        world.run(1, go_on, ONE, zero, str(folder), str(tmp_path / "again"), 0)


# ---- what a device cannot do


def test_cpu_adam_on_a_gpu_needs_offloading() -> None:
    class OnGPU(nn.Parameter):
        is_cuda = True

    parameter = OnGPU(torch.zeros(2, 2))
    offload = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    config = config_of(**chosen("cpu_torch_adam"))
    with pytest.raises(ConfigError, match=r"cpu_torch_adam.*offload_optimizer: \{device: cpu\}"):
        build_optimizer(config, [parameter])
    config = config_of(**chosen("cpu_torch_adam"), zero_optimization=offload)
    assert isinstance(build_optimizer(config, [parameter]), torch.optim.AdamW)


def test_8_bit_adam_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import torch; from neox.engine.eight_bit import build_adam8bit\n"
        "build_adam8bit([{'params': [torch.nn.Parameter(torch.zeros(2))]}])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert capfd.readouterr() == ("", "")
