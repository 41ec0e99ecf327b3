"""Scores of many texts in one row, trees among them, are those of each text by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.evaluation.trees import plant
from neox.inference import stages
from neox.inference.stages import InferenceModel
from neox.model.packing import Packing
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.inference.small import small_model
from tests.models import ARCHITECTURES, VOCAB
from tests.world import World

START = [5, 9, 2, 7, 7, 1, 30, 12]
TEXTS = [
    [*START, 4, 8, 15],
    [*START, 4, 8, 16, 23, 42],
    [*START, 4, 3],
    START,
    [1],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3],
]


def questions() -> tuple[Tensor, Packing, Tensor, Tensor, list[tuple[int, int, int]]]:
    """All tokens of all texts, each asked for two successors; (text, place, target) of each."""
    trees = plant(TEXTS, most_tokens=1000)
    assert max(len(tree.paths) for tree in trees) == 4
    packing = Packing.of([tree.runs for tree in trees])
    row, asked, targets, told = [], [], [], []
    for tree in trees:
        for text, path in tree.paths.items():
            for place, token in enumerate(path):
                for target in (17, (3 * place) % VOCAB):
                    asked.append(len(row) + token)
                    targets.append(target)
                    told.append((text, place, target))
        row += tree.tokens
    assert len(row) < sum(map(len, TEXTS))
    return torch.tensor(row), packing, torch.tensor(asked), torch.tensor(targets), told


def scores(model: InferenceModel, arguments: tuple[Tensor, Packing, Tensor, Tensor]) -> Any:
    tokens_S, packing, asked_K, targets_K = arguments
    wanted_U, rows_K = asked_K.unique(return_inverse=True)
    hidden_UH = model.hidden(tokens_S, packing, wanted_U)
    return None if hidden_UH is None else model.target_scores(hidden_UH, rows_K, targets_K)


def one_by_one(model: InferenceModel, told: list[tuple[int, int, int]]) -> Tensor:
    scores = []
    for text, place, target in told:
        logits_SV = model(torch.tensor([TEXTS[text]]))[0].double()
        log_probabilities_V = logits_SV[place].log_softmax(-1)
        likeliest = log_probabilities_V.argmax() == target
        scores.append([float(log_probabilities_V[target]), float(likeliest)])
    return torch.tensor(scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    model = small_model(ProcessGroups.single(), **ARCHITECTURES[architecture])
    *arguments, told = questions()
    got = scores(model, arguments)
    assert_close(got, one_by_one(model, told), rtol=1e-5, atol=2e-5)
    assert len(got[:, 0].unique()) > 40


def test_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(ProcessGroups.single())
    *arguments, told = questions()
    monkeypatch.setattr(stages, "CHUNK_BYTES", 7 * 4 * VOCAB)
    assert model.logit_rows == 7
    assert_close(scores(model, arguments), one_by_one(model, told), rtol=1e-5, atol=2e-5)


def on_a_grid(rank: int, topology: Topology, values: dict[str, Any]) -> Tensor | None:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    model = small_model(groups, **values)
    *arguments, _ = questions()
    return scores(model, arguments)


@pytest.mark.parametrize("architecture", ["neox", "tied", "learned"])
@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(tp=2, pp=2)])
def test_every_grid(world: World, topology: Topology, architecture: str) -> None:
    values = ARCHITECTURES[architecture]
    found = world.run(topology.world_size, on_a_grid, topology, values)
    *_, told = questions()
    expected = one_by_one(small_model(ProcessGroups.single(), **values), told)
    for rank, got in enumerate(found):
        if topology.coordinate(rank).pp == topology.pp - 1:
            assert_close(got, expected, rtol=1e-5, atol=2e-5)
        else:
            assert got is None


@pytest.mark.parametrize("equal", [(2, 5), (3, 4), (0, 1)])
def test_of_equally_likely_tokens_the_first_is_the_likeliest(
    world: World, equal: tuple[int, int]
) -> None:
    """Wherever the ranks' slices of the vocabulary begin."""
    for tp in (1, 2):
        for got in world.run(tp, scores_of_equals, tp, equal):
            assert got[:, 1].tolist() == [float(v == equal[0]) for v in range(7)]
            assert_close(got[:, 0].exp().sum(), torch.tensor(1.0))


def scores_of_equals(rank: int, tp: int, equal: tuple[int, int]) -> Tensor:
    """Of a vocabulary of 7, whose last slice at tp 2 has a further row."""
    from neox.model.loss import score_targets_

    groups = initialize(Topology(tp=tp), "gloo", torch.device("cpu"))
    logits_UV = torch.tensor([[0.0, 0.5, 0.25, 0.1, 0.2, 0.3, 0.4, 9.0]])
    logits_UV[:, list(equal)] = 2.0
    local = logits_UV.chunk(tp, dim=1)[rank] if tp > 1 else logits_UV[:, :7]
    rows_K = torch.zeros(7, dtype=torch.int64)
    return score_targets_(local.t().contiguous(), rows_K, torch.arange(7), 7, groups)
