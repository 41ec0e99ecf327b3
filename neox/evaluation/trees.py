"""Texts that begin alike become trees, which a forward pass computes each beginning of once.

A multiple-choice question is in front of all its answers, and those often begin alike themselves;
solved examples are in front of many questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_WORTH = 8  # tokens in common, from which a mask in attention costs less than it saves


@dataclass
class Tree:
    """Some texts' tokens, each beginning once; a token stands behind all those before it."""

    tokens: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)  # as neox.model.packing.Group
    paths: dict[int, list[int]] = field(default_factory=dict)  # text -> where its tokens are

    def add(self, text: int, tokens: Sequence[int], beginning: list[int]) -> list[int]:
        """Add a text whose first tokens are there already, at the places `beginning`."""
        new = tokens[len(beginning) :]
        if new:
            self.runs.append((len(new), beginning[-1] if beginning else -1))
        path = [*beginning, *range(len(self.tokens), len(self.tokens) + len(new))]
        self.tokens.extend(new)
        self.paths[text] = path
        return path


def plant(
    texts: Sequence[Sequence[int]], *, most_tokens: int, most_texts: int | None = None
) -> list[Tree]:
    """Every text in one of the trees, the largest trees first.

    A tree has `most_tokens` at most unless it is a single text, and `most_texts` at most.
    """
    trees: list[Tree] = []
    previous: Sequence[int] = ()
    path: list[int] = []
    for text in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        tokens = texts[text]
        # In alphabetical order no earlier text has more in common with this one than the last.
        common = _common(previous, tokens)
        fits = bool(trees) and len(trees[-1].tokens) + len(tokens) - common <= most_tokens
        fits = fits and (most_texts is None or len(trees[-1].paths) < most_texts)
        if not fits or common < min(_WORTH, -(-len(tokens) // 4)):
            trees.append(Tree())
            common = 0
        path = trees[-1].add(text, tokens, path[:common])
        previous = tokens
    return sorted(trees, key=lambda tree: len(tree.tokens), reverse=True)


def passes(
    trees: Sequence[Tree], *, most_tokens: int, most_texts: int | None = None
) -> Iterator[list[Tree]]:
    """Trees of a forward pass, in order: `most_tokens` together, but one tree at least."""
    batch: list[Tree] = []
    tokens = texts = 0
    for tree in trees:
        full = tokens + len(tree.tokens) > most_tokens
        full = full or (most_texts is not None and texts + len(tree.paths) > most_texts)
        if batch and full:
            yield batch
            batch, tokens, texts = [], 0, 0
        batch.append(tree)
        tokens += len(tree.tokens)
        texts += len(tree.paths)
    if batch:
        yield batch


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
