"""Sharded equals unsharded: outputs and every gradient at tp 2 and 4, and what it costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from neox.model.loss import cross_entropy
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import ARCHITECTURES, built, config_of, forward, random_weights, tokens
from tests.world import World

# One worker call sweeps these: a call costs more than an architecture.
TP2 = [name for name in ARCHITECTURES if name not in ("relu", "mish", "softsign", "tanh_gelu")]
TP4 = ["neox", "sequential", "geglu"]


def loss_and_gradients(config, weights, groups) -> tuple[Tensor, dict[str, Tensor]]:
    stage = built(config, weights, groups)
    data = tokens(length=17)
    mask = torch.ones(2, 16)
    mask[0, 5:9] = 0
    loss = cross_entropy(forward(stage, data[:, :-1]), data[:, 1:], mask, groups)
    loss.backward()
    gradients = {
        f"{layer.index}.{name}": parameter.grad
        for layer, module in stage
        if layer.has_file
        for name, parameter in module.named_parameters()
    }
    return loss.detach(), gradients


def compare_with_unsharded(rank: int, tp: int, names: list[str]) -> None:
    groups = initialize(Topology(tp=tp), "gloo", torch.device("cpu"))
    for name in names:
        config = config_of(world_size=tp, model_parallel_size=tp, **ARCHITECTURES[name])
        weights = random_weights(config)
        layouts = {
            f"{layer.index}.{parameter}": layout
            for layer, _ in built(config, weights, ProcessGroups.single())
            for parameter, layout in (layer.layout or {}).items()
        }
        loss, gradients = loss_and_gradients(config, weights, groups)
        whole_loss, whole_gradients = loss_and_gradients(config, weights, ProcessGroups.single())
        assert_close(loss, whole_loss, atol=1e-6, rtol=1e-6)
        assert set(gradients) == set(whole_gradients)
        for at, gradient in gradients.items():
            expected = shard(whole_gradients[at], layouts[at], rank, tp)
            assert_close(
                gradient,
                expected,
                atol=1e-6,
                rtol=1e-4,
                msg=lambda text, at=at, name=name: f"{name}, {at}, rank {rank}: {text}",
            )


def test_tp_2_equals_tp_1(world: World) -> None:
    world.run(2, compare_with_unsharded, 2, TP2)


def test_tp_4_equals_tp_1(world: World) -> None:
    world.run(4, compare_with_unsharded, 4, TP4)


@contextlib.contextmanager
def counted_all_reduces() -> Iterator[list[int]]:
    """The sizes, in elements, of the all-reduces made inside the block."""
    sizes: list[int] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def block_all_reduces(rank: int, architecture: str) -> tuple[list[int], list[int]]:
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    config = config_of(world_size=2, model_parallel_size=2, **ARCHITECTURES[architecture])
    _, block = built(config, random_weights(config), groups)[2]
    x = torch.randn(16, 2, 32, requires_grad=True)
    with counted_all_reduces() as forward_sizes:
        y = block(x)
    with counted_all_reduces() as backward_sizes:
        y.sum().backward()
    return forward_sizes, backward_sizes


ACTIVATIONS = 16 * 2 * 32  # S x B x H


def test_a_parallel_residual_costs_one_all_reduce_each_way(world: World) -> None:
    for forward_sizes, backward_sizes in world.run(2, block_all_reduces, "neox"):
        assert forward_sizes == [ACTIVATIONS]
        # The gradients of two norms (weight and bias) and two row-parallel biases ride along.
        assert backward_sizes == [ACTIVATIONS + 6 * 32]


@pytest.mark.parametrize("architecture", ["sequential"])
def test_a_sequential_residual_costs_two(world: World, architecture: str) -> None:
    for forward_sizes, backward_sizes in world.run(2, block_all_reduces, architecture):
        assert forward_sizes == [ACTIVATIONS] * 2
        assert backward_sizes == [ACTIVATIONS] * 2
