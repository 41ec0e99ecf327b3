"""The real model with a cache gives the logits it gives without one, however the tokens come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neox.inference.stages import InferenceModel
from neox.model import cached_attention
from neox.model.cached_attention import attend_together
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.inference.small import small_model
from tests.models import ARCHITECTURES, VOCAB, tokens
from tests.world import World

ROWS = [3, 0, 1]  # of a cache of four


def with_cache(model: InferenceModel, tokens_BS: Tensor) -> Tensor | None:
    """Logits of three rows that are 0, 3 and 7 tokens ahead of each other all along."""
    cache = model.new_cache(4, 16)
    for row in range(4):
        cache.erase(row)  # as it is where `attend_together` serves
    found = [[] for _ in ROWS]
    lengths = [0, 0, 0]

    def go_on(which: list[int], new: int) -> None:
        view = cache.view([ROWS[b] for b in which], [lengths[b] for b in which], new)
        pieces = [tokens_BS[b, lengths[b] : lengths[b] + new] for b in which]
        logits_BSV = model(torch.stack(pieces), view)
        for i, b in enumerate(which):
            lengths[b] += new
            found[b].append(None if logits_BSV is None else logits_BSV[i])

    go_on([1], 3)
    go_on([2], 7)
    for new in (4, 1, 1, 3):
        go_on([0, 1, 2], new)
    go_on([0, 1], 2)
    go_on([0], 5)
    go_on([1], 2)
    assert lengths == [16, 16, 16]
    return None if found[0][0] is None else torch.stack([torch.cat(row) for row in found])


def check(got: Tensor, expected: Tensor) -> None:
    """ONE PASS of docs/numerics.md, at logits of up to some tens."""
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["compiled", "eager", "eager as on a GPU"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_with_a_cache_are_those_without(architecture, way, monkeypatch):
    if way == "eager as on a GPU":
        monkeypatch.setattr(cached_attention, "attend_by_runs", attend_together)
    values = {**ARCHITECTURES[architecture], "compile_decoding": way == "compiled"}
    model = small_model(ProcessGroups.single(), **values)
    assert model.compiles == (way == "compiled" and architecture not in ("mish", "softsign"))
    tokens_BS = tokens(3, 16)
    expected = model(tokens_BS)
    check(with_cache(model, tokens_BS), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def on_a_grid(rank: int, topology: Topology, values: dict) -> Tensor | None:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    return with_cache(small_model(groups, **values), tokens(3, 16))


@pytest.mark.parametrize("architecture", ["learned", "grouped_queries"])
@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(tp=2, pp=2)], ids=str)
def test_every_grid(world: World, topology: Topology, architecture: str) -> None:
    values = ARCHITECTURES[architecture]
    found = world.run(topology.world_size, on_a_grid, topology, values)
    expected = small_model(ProcessGroups.single(), **values)(tokens(3, 16))
    check(found[-1], expected)


def test_only_the_logits_that_are_wanted_are_computed():
    model = small_model(ProcessGroups.single())
    cache = model.new_cache(2, 16)
    tokens_BS = tokens(2, 16)
    assert model(tokens_BS[:, :9], cache.view([0, 1], [0, 0], 9), logits="none") is None
    last = model(tokens_BS[:, 9:], cache.view([0, 1], [9, 9], 7), logits="last")
    assert last.shape == (2, 1, VOCAB)
    check(last, model(tokens_BS)[:, -1:])
