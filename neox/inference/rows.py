"""Which row of the cache an answer gets, and what of its prompt is there already.

A prompt is computed in chunks. Only whole chunks are taken over from another row: their keys and
values came from the same arithmetic as this prompt's own would, so that an answer is the same
whatever was asked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from neox.inference.cache import KVCache

# Most positions of a pass over a prompt: enough for matrix products to run at full speed, few
# enough for answers that run meanwhile to wait for.
CHUNK = 256


@dataclass
class Row:
    """known: the tokens of its first whole chunks, which any prompt that begins alike may use.

    length: positions that it holds. used: when it was last given up or copied from.
    """

    index: int
    adapter: str | None = None
    known: list[int] = field(default_factory=list)
    length: int = 0
    free: bool = True
    used: int = 0


class Rows:
    """The rows of a cache. Every rank does the same with its own."""

    def __init__(self, cache: KVCache, chunk: int) -> None:
        self._cache = cache
        self._chunk = chunk
        self._rows = [Row(i) for i in range(cache.rows)]
        self._clock = 0

    @property
    def any_free(self) -> bool:
        return any(row.free for row in self._rows)

    def take(self, prompt: Sequence[int], adapter: str | None) -> Row:
        """A free row that holds as much of the prompt as any row does, short of its last token.

        A row that holds nothing else is taken as it is. Otherwise the row that has been of no use
        for longest gets a copy, and the one that is copied from stays good for others if it can.
        """
        shared = [self._shared(row, prompt, adapter) for row in self._rows]
        as_it_is = [
            row.free and len(row.known) == n for row, n in zip(self._rows, shared, strict=True)
        ]
        source = max(self._rows, key=lambda row: (shared[row.index], as_it_is[row.index]))
        row = source
        if shared[source.index] == 0 or not as_it_is[source.index]:
            free = [row for row in self._rows if row.free]
            others = [row for row in free if row is not source or shared[row.index] == 0]
            row = min(others or free, key=_worth)
        length = shared[row.index]
        row.free, row.adapter = False, adapter
        row.known, row.length = list(prompt[:length]), length
        self.extend(row, prompt)
        return row

    def extend(self, row: Row, prompt: Sequence[int]) -> None:
        """Copy what another row holds of the prompt beyond what `row`, which was taken, does.

        Before every pass over a prompt: others that begin alike may be under way, too, and each
        chunk that they share is then computed once, by whoever comes to it first.
        """
        shared = [self._shared(other, prompt, row.adapter) for other in self._rows]
        source = max(self._rows, key=lambda other: shared[other.index])
        length = shared[source.index]
        if length > row.length:
            self._touch(source)
            self._cache.copy(source.index, row.index, row.length, length)
            row.known, row.length = list(prompt[:length]), length

    def add(self, row: Row, tokens: Sequence[int]) -> None:
        """Count a chunk of the prompt as held, behind those before it."""
        row.length += len(tokens)
        if len(tokens) == self._chunk:
            row.known += tokens

    def give_up(self, row: Row) -> None:
        """Free a row; its whole chunks stay to be shared."""
        row.free = True
        self._touch(row)

    def erase(self, row: Row) -> None:
        """Forget what a row holds, where it may be no numbers."""
        self._cache.erase(row.index)
        row.known, row.length = [], 0

    def _touch(self, row: Row) -> None:
        self._clock += 1
        row.used = self._clock

    def _shared(self, row: Row, prompt: Sequence[int], adapter: str | None) -> int:
        """Positions of `row` that the prompt begins with: whole chunks, and not the last token."""
        if row.adapter != adapter:
            return 0
        end = 0
        most = min(len(row.known), len(prompt) - 1)
        while end + self._chunk <= most:
            chunk = slice(end, end + self._chunk)
            if row.known[chunk] != list(prompt[chunk]):
                break
            end = chunk.stop
        return end


def _worth(row: Row) -> tuple[int, int]:
    """Rows without anything to share first, the lowest first: its memory has been in use."""
    return (row.used if row.known else 0, row.index)
