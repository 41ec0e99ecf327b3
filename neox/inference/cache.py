"""The keys and values of the tokens seen so far: memory for a number of rows.

Shape letters: L layers of this rank's stage, R rows, K key/value heads of this rank, T positions
that a row can hold, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neox.errors import ConfigError
from neox.model.cached_attention import LayerCache, Span


class KVCache:
    """Keys and values of one stage's layers, in memory allocated once and never moved.

    It is memory and knows nothing of what is in it: who uses it knows how long each row is, and
    says so for every pass (`view`).
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        kv_heads_local: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Raises ConfigError where there is not so much memory."""
        is_cpu = torch.device(device).type == "cpu"
        # Elsewhere graphs are made for few lengths, and a row has a position for passes that leave
        # it out: see GraphPass.
        positions = max_length if is_cpu else (1 << (max_length - 1).bit_length()) + 1
        shape = (num_layers, rows, kv_heads_local, positions, head_dim)
        # On a CPU unset memory: the system hands out its pages as rows grow, and nothing is read
        # before it is written. Elsewhere what is masked is multiplied by 0, and has to be finite.
        allocate = torch.empty if is_cpu else torch.zeros
        try:
            self.keys_LRKTD = allocate(shape, dtype=dtype, device=device)
            self.values_LRKTD = allocate(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # a CPU's allocator has none of its own
            size = 2 * math.prod(shape) * dtype.itemsize / 2**30
            raise ConfigError(
                f"the keys and values of {rows} rows of {max_length} tokens take {size:,.1f} GiB "
                "in each process, more than there is: set fewer rows (serve_rows, "
                "generate_batch_size or eval_batch_size) or fewer tokens"
            ) from error
        self.rows = rows
        self.max_length = max_length

    def view(self, rows: Sequence[int], lengths: Sequence[int], new: int) -> CacheView:
        """For a pass that gives each of `rows`, which holds `lengths` positions, `new` more."""
        span = Span(rows, lengths, new, self.keys_LRKTD.device)
        assert span.stop <= self.max_length, f"{span.stop} positions exceed {self.max_length}"
        return CacheView(self, span)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Give a row the positions of another from `start` to `stop`, which is none of them."""
        for memory in (self.keys_LRKTD, self.values_LRKTD):
            memory[:, target, :, start:stop] = memory[:, source, :, start:stop]

    def erase(self, row: int) -> None:
        """Set a row to 0, in case it holds what is no number."""
        self.keys_LRKTD[:, row] = 0
        self.values_LRKTD[:, row] = 0


@dataclass(frozen=True)
class CacheView:
    """What a forward pass is handed: the memory, and which rows it continues."""

    memory: KVCache
    span: Span

    def layer(self, i: int) -> LayerCache:
        """Of the `i`-th layer of this stage that has attention, counted from 0."""
        return LayerCache(self.memory.keys_LRKTD[i], self.memory.values_LRKTD[i], self.span)
