"""Dropout streams: shared where ranks must agree, their own where they must not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import DropoutStreams, derive_seed
from neox.parallel.topology import Topology


def streams(rank: int, topology: Topology, seed: int = 1) -> DropoutStreams:
    return DropoutStreams(seed, ProcessGroups(topology, rank, torch.device("cpu")))


def draws(rank: int, topology: Topology, iteration: int) -> tuple[list[float], list[float]]:
    source = streams(rank, topology)
    source.start_iteration(iteration)
    with source.local():
        local = torch.rand(4).tolist()
    return torch.rand(4).tolist(), local


def test_tp_ranks_share_one_stream_and_keep_one_each() -> None:
    shared0, local0 = draws(0, Topology(tp=2), 5)
    shared1, local1 = draws(1, Topology(tp=2), 5)
    assert shared0 == shared1
    assert local0 != local1
    assert shared0 != local0


def test_replicas_and_iterations_differ() -> None:
    assert draws(0, Topology(dp=2), 5) != draws(1, Topology(dp=2), 5)
    assert draws(0, Topology(dp=2), 5) != draws(0, Topology(dp=2), 6)


def test_an_iteration_can_be_repeated_after_others() -> None:
    first = draws(0, Topology(tp=2), 5)
    draws(0, Topology(tp=2), 6)
    assert draws(0, Topology(tp=2), 5) == first


def test_the_local_stream_does_not_disturb_the_shared_one() -> None:
    source = streams(0, Topology(tp=2))
    source.start_iteration(1)
    expected = torch.rand(8).tolist()
    source.start_iteration(1)
    got = torch.rand(4).tolist()
    with source.local():
        torch.rand(100)
    assert got + torch.rand(4).tolist() == expected


def test_recomputed_activations_drop_the_same_elements() -> None:
    source = streams(0, Topology(tp=2))

    def layer(x):
        with source.local():
            x = F.dropout(x, 0.5)
        return F.dropout(x, 0.5) * x

    def gradient(recompute: bool) -> torch.Tensor:
        source.start_iteration(3)
        x = torch.linspace(1, 2, 64, requires_grad=True)
        y = x
        for _ in range(2):
            if recompute:
                y = checkpoint(layer, y, use_reentrant=False, context_fn=source.recompute_contexts)
            else:
                y = layer(y)
        y.sum().backward()
        return x.grad

    assert torch.equal(gradient(recompute=True), gradient(recompute=False))


def test_seeds_are_stable_across_processes() -> None:
    # A literal: `hash` of a string would differ from one process to the next.
    assert derive_seed("a") == 3136151050186550259
