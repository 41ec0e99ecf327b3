"""The decoding pass that CUDA gets as a graph: traced whole here, and carried out by torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from neox.inference import stages
from neox.inference.graphs import GraphPass, can_record
from neox.inference.stages import InferenceModel
from neox.model.frozen import Frozen
from neox.model.gpt import LocalLayers, build_layers, layers
from neox.parallel.groups import ProcessGroups
from tests.models import ARCHITECTURES, VOCAB, built, config_of, random_weights, tokens

SINGLE = ProcessGroups.single()
LENGTH = 16


def stage_of(**values: Any) -> LocalLayers:
    config = config_of(**values)
    return built(config, random_weights(config), SINGLE)


# A graph that breaks, or depends on a number in a tensor, is an error of fullgraph.
@pytest.mark.parametrize("name", ["neox", "gpt_j", "llama", "tied", "learned", "window"])
def test_the_graph_is_the_eager_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.inference.graphs._SHORTEST", 4)  # three graphs: 4, 8, 16
    monkeypatch.setattr(stages, "can_record", lambda groups, stage: True)
    monkeypatch.setattr(stages, "GraphPass", partial(GraphPass, how={"backend": "aot_eager"}))
    torch._dynamo.reset()
    stage = stage_of(**ARCHITECTURES[name])
    model, eager = (
        InferenceModel(
            config_of(**ARCHITECTURES[name], compile_decoding=compiles),
            SINGLE,
            stage,
            VOCAB,
            torch.float32,
        )
        for compiles in (True, False)
    )
    assert (model.records, eager.records) == (True, False)
    # The last position of this one stands for that which a cache on CUDA has more.
    cache, other = model.new_cache(3, LENGTH + 1), model.new_cache(3, LENGTH)
    cache.keys_LRKTD.fill_(0.0)
    cache.values_LRKTD.fill_(0.0)
    text = tokens(3, LENGTH)
    lengths = [2, 3, 9]
    for row, length in enumerate(lengths):
        prompt = text[row : row + 1, :length]
        model(prompt, cache.view([row], [0], length), logits="none")
        eager(prompt, other.view([row], [0], length), logits="none")
    before = cache.keys_LRKTD.clone()
    for rows in ([1], [0, 1], [2], [1, 0], [0, 1, 2], [2, 0]):
        now = [lengths[row] for row in rows]
        last = torch.stack([text[row, lengths[row]] for row in rows])[:, None]
        found, expected = (
            model(last, cache.view(rows, now, 1)),
            eager(last, other.view(rows, now, 1)),
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for row in rows:
            lengths[row] += 1
    # What a row held stayed as it was, through passes that left it out.
    for row, length in enumerate([2, 3, 9]):
        assert torch.equal(cache.keys_LRKTD[:, row, :, :length], before[:, row, :, :length])


def test_caches_of_many_lengths_have_graphs_of_their_own() -> None:
    torch._dynamo.reset()
    stage = stage_of()
    for length in range(2, 12):  # more than torch compiles of one function by default
        keys, values = torch.zeros(2, 2, 2, 4, length, 8)
        graph = GraphPass(stage, keys, values, {"backend": "eager"})
        with torch.inference_mode():
            logits = graph(torch.tensor([[5]]), torch.tensor([1]), torch.tensor([0]), 1)
        assert logits.isfinite().all()


def test_only_a_whole_dense_model_on_cuda_is_recorded() -> None:
    dense = stage_of()
    cuda = replace(SINGLE, device=torch.device("cuda"))
    assert can_record(cuda, dense)
    assert not can_record(SINGLE, dense)
    frozen = Frozen(torch.float32, cuda, "int4")
    model = layers(config_of(), VOCAB, torch.float32, SINGLE, frozen=frozen)
    assert not can_record(cuda, build_layers(model, lambda module, layer: None))
