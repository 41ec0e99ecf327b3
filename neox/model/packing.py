"""Many texts in one row, each of which sees only itself; what they begin with alike, only once.

Shapes: S tokens of the row, G groups, L places in the longest group, F numbers of a token. A group
is one text, or a tree of texts that begin alike: a token follows another and sees that one and all
that it sees. Everything but attention treats tokens one by one and needs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (length, predecessor) of each run of tokens, in the order of the row. Within a run a token follows
# the one before it; the predecessor is the place, in the group, of the token that the run's first
# one follows, or -1 where a text begins.
Group = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Packing:
    """How a row of S tokens is laid out.

    positions_S: the place of each token in its text, which rotary and learned embeddings want.
    tokens_GL: which token of the row is at each place of each group; 0 where the group has ended.
    places_S: where each token is in `tokens_GL`, flattened.
    sees_GLL: bool; None where every group is a single text, so that plain causality says it all.
    """

    positions_S: Tensor
    tokens_GL: Tensor
    places_S: Tensor
    sees_GLL: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Packing:
        """Lay out groups one after the other."""
        sizes = [sum(length for length, _ in runs) for runs in groups]
        longest = max(sizes)
        tokens = torch.zeros(len(groups), longest, dtype=torch.int64)
        positions: list[int] = []
        places: list[int] = []
        branching = any(len(runs) > 1 for runs in groups)
        sees = torch.zeros(len(groups), longest, longest, dtype=torch.bool) if branching else None
        start = 0
        for g, (runs, size) in enumerate(zip(groups, sizes, strict=True)):
            tokens[g, :size] = torch.arange(start, start + size)
            places.extend(range(g * longest, g * longest + size))
            positions.extend(_positions(runs))
            if sees is not None:
                _fill(sees[g], runs)
            start += size
        return cls(torch.tensor(positions), tokens, torch.tensor(places), sees)

    def to(self, device: torch.device) -> Packing:
        sees = None if self.sees_GLL is None else self.sees_GLL.to(device)
        return Packing(
            self.positions_S.to(device), self.tokens_GL.to(device), self.places_S.to(device), sees
        )

    def spread(self, x_SF: Tensor) -> Tensor:
        """By groups, as attention wants it: [G, L, F]. Places behind a group's end hold junk."""
        return x_SF.index_select(0, self.tokens_GL.flatten()).view(*self.tokens_GL.shape, -1)

    def collect(self, x_GLF: Tensor) -> Tensor:
        """Back into the row: [S, F]."""
        return x_GLF.flatten(0, 1).index_select(0, self.places_S)

    def mask(self, window: int | None) -> Tensor | None:
        """[G, 1, L, L] of allowed pairs, or None for plain causality.

        With a window, a query at position i of its text sees i - window ... i.
        """
        length = self.tokens_GL.shape[1]
        if window is not None and window + 1 >= length:
            window = None  # it reaches everything
        if self.sees_GLL is None and window is None:
            return None
        sees_GLL = self.sees_GLL
        if sees_GLL is None:
            causal = torch.ones(length, length, dtype=torch.bool, device=self.places_S.device)
            sees_GLL = causal.tril().expand(len(self.tokens_GL), -1, -1)
        if window is not None:
            positions_GL = self.positions_S[self.tokens_GL]
            distance_GLL = positions_GL[:, :, None] - positions_GL[:, None, :]
            sees_GLL = sees_GLL & (distance_GLL <= window)
        return sees_GLL[:, None]


def _positions(runs: Group) -> list[int]:
    positions: list[int] = []
    for length, predecessor in runs:
        first = positions[predecessor] + 1 if predecessor >= 0 else 0
        positions.extend(range(first, first + length))
    return positions


def _fill(sees_LL: Tensor, runs: Group) -> None:
    start = 0
    for length, predecessor in runs:
        rows = slice(start, start + length)
        if predecessor >= 0:
            sees_LL[rows] = sees_LL[predecessor]
        sees_LL[rows, rows] = torch.ones(length, length, dtype=torch.bool).tril()
        start += length
    sees_LL[start:, 0] = True  # a softmax over nothing would be NaN, and only there
