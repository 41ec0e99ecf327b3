"""Sharded equals unsharded: outputs and every gradient at tp 2 and 4, and what it costs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

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
    *before, (head, projection) = stage
    x = forward(before, data[:, :-1])
    loss = head(projection, x, data[:, 1:], mask)
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
    for name, sequence_parallel in itertools.product(names, (False, True)):
        config = config_of(
            world_size=tp,
            model_parallel_size=tp,
            sequence_parallel=sequence_parallel,
            **ARCHITECTURES[name],
        )
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
                msg=lambda text, at=(name, sequence_parallel, at, rank): f"{at}: {text}",
            )


def test_tp_2_equals_tp_1(world: World) -> None:
    world.run(2, compare_with_unsharded, 2, TP2)


def test_tp_4_equals_tp_1(world: World) -> None:
    world.run(4, compare_with_unsharded, 4, TP4)


Message = tuple[str, int]  # what it is, and its elements


@contextlib.contextmanager
def messages() -> Iterator[list[Message]]:
    """What is sent inside the block; of a gather and a scatter, the elements of the whole."""
    sent: list[Message] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, whole in (
            ("all_reduce", 0),
            ("all_gather_single", 0),
            ("reduce_scatter_single", 1),
        ):
            real = getattr(dist, name)

            def counting(*tensors: Tensor, name=name, whole=whole, real=real, **kwargs):
                sent.append((name, tensors[whole].numel()))
                return real(*tensors, **kwargs)

            patch.setattr(dist, name, counting)
        yield sent


def block_messages(
    rank: int, architecture: str, sequence_parallel: bool
) -> tuple[list[Message], list[Message]]:
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    config = config_of(
        world_size=2,
        model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        **ARCHITECTURES[architecture],
    )
    _, block = built(config, random_weights(config), groups)[2]
    x = torch.randn(8 if sequence_parallel else 16, 2, 32, requires_grad=True)
    with messages() as forward_messages:
        y = block(x)
    assert y.shape == x.shape
    with messages() as backward_messages:
        y.sum().backward()
    return forward_messages, backward_messages


ACTIVATIONS = 16 * 2 * 32  # S x B x H
# The gradients of a norm (weight and bias) and a row-parallel bias ride along with x's.
RIDERS = 3 * 32


@pytest.mark.parametrize(("architecture", "branches"), [("neox", 2), ("sequential", 1)])
def test_a_residual_costs_one_all_reduce_each_way(
    world: World, architecture: str, branches: int
) -> None:
    """A parallel residual has both branches in one message, a sequential one has two messages."""
    count = 2 // branches
    for forward_messages, backward_messages in world.run(2, block_messages, architecture, False):
        assert forward_messages == [("all_reduce", ACTIVATIONS)] * count
        assert backward_messages == [("all_reduce", ACTIVATIONS + branches * RIDERS)] * count


@pytest.mark.parametrize(("architecture", "branches"), [("neox", 2), ("sequential", 1)])
def test_with_sequence_parallelism_one_gather_and_one_scatter(
    world: World, architecture: str, branches: int
) -> None:
    gather, scatter = ("all_gather_single", ACTIVATIONS), ("reduce_scatter_single", ACTIVATIONS)
    riders = ("all_reduce", branches * RIDERS)
    count = 2 // branches
    for forward_messages, backward_messages in world.run(2, block_messages, architecture, True):
        assert forward_messages == [gather, scatter] * count
        assert backward_messages == [gather, scatter, riders] * count
