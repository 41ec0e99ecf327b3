"""Trees of texts: every text is in one, whole, and what texts begin with alike is there once."""

from __future__ import annotations

import random

import pytest

from neox.evaluation.trees import Tree, passes, plant
from neox.model.packing import Packing

START = tuple(range(20))


def texts_of(seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    texts: set[tuple[int, ...]] = {(1,), (1, 2), START, (*START, 5)}
    while len(texts) < 60:
        start = draw.choice([(), START, START[:9], (7,) * 12])
        texts.add(start + tuple(draw.randrange(3) for _ in range(draw.randrange(1, 30))))
    return draw.sample(sorted(texts), len(texts))


def tokens_on(tree: Tree, path: list[int]) -> tuple[int, ...]:
    return tuple(tree.tokens[place] for place in path)


@pytest.mark.parametrize("limits", [{}, {"most_texts": 1}, {"most_texts": 3}, {"most_tokens": 64}])
@pytest.mark.parametrize("seed", range(5))
def test_every_text_is_in_one_tree(seed: int, limits: dict[str, int]) -> None:
    texts = texts_of(seed)
    trees = plant(texts, **{"most_tokens": 1000, **limits})
    found = {text: tokens_on(tree, path) for tree in trees for text, path in tree.paths.items()}
    assert found == dict(enumerate(texts))
    assert sum(len(tree.paths) for tree in trees) == len(texts)
    sizes = [len(tree.tokens) for tree in trees]
    assert sizes == sorted(sizes, reverse=True)
    for tree in trees:
        assert len(tree.paths) <= limits.get("most_texts", len(texts))
        assert len(tree.tokens) <= limits.get("most_tokens", 1000) or len(tree.paths) == 1
    if limits.get("most_texts") == 1:
        assert sum(sizes) == sum(map(len, texts))
    else:
        assert sum(sizes) < 0.8 * sum(map(len, texts))


@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_its_text_and_nothing_else(seed: int) -> None:
    texts = texts_of(seed)
    trees = plant(texts, most_tokens=1000)
    packing = Packing.of([tree.runs for tree in trees])
    assert packing.sees_GLL is not None
    start = 0
    for g, tree in enumerate(trees):
        for path in tree.paths.values():
            for i, place in enumerate(path):
                seen = packing.sees_GLL[g, place].nonzero()[:, 0].tolist()
                assert seen == sorted(path[: i + 1])
                assert packing.positions_S[start + place] == i
                assert packing.tokens_GL[g, place] == start + place
        start += len(tree.tokens)
    assert packing.sees_GLL.any(dim=2).all()  # also where a group has ended: else NaN


def test_single_texts_need_no_mask() -> None:
    trees = plant([(1, 2, 3), (4, 5)], most_tokens=10)
    packing = Packing.of([tree.runs for tree in trees])
    assert packing.sees_GLL is None and packing.mask(None) is None
    window = [[True, False, False], [True, True, False], [False, True, True]]
    assert packing.mask(1)[0, 0].tolist() == window


def test_few_tokens_in_common_are_no_tree() -> None:
    long = tuple(range(100, 140))
    trees = plant([(1, 2, 3, *long), (1, 2, 3, *reversed(long))], most_tokens=1000)
    assert [len(tree.paths) for tree in trees] == [1, 1]
    trees = plant([(1, 2, 3, 4), (1, 2, 3, 5)], most_tokens=1000)  # 3 of 4
    assert [len(tree.paths) for tree in trees] == [2]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"most_tokens": 10}, [[9], [6, 4], [3, 2, 1]]),
        ({"most_tokens": 1}, [[9], [6], [4], [3], [2], [1]]),
        ({"most_tokens": 100, "most_texts": 2}, [[9, 6], [4, 3], [2, 1]]),
    ],
)
def test_passes_keep_to_the_limits(limits: dict[str, int], expected: list[list[int]]) -> None:
    trees = plant([(n,) * n for n in (1, 2, 3, 4, 6, 9)], most_tokens=1)
    found = [[len(tree.tokens) for tree in batch] for batch in passes(trees, **limits)]
    assert found == expected
