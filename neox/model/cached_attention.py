"""Attention of new positions over a cache of earlier ones, whose rows are of different lengths.

Shapes: R rows of the cache, B rows that a pass continues, S new positions of each, T positions up
to the last new one, N local query heads, K local key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from neox.model.positions import RotaryTable


class Span:
    """The rows that a forward pass continues, and from where: what all its layers share.

    rows_B, lengths_B: which rows, and how many positions each holds before the pass; int64, on
    the CPU.
    positions_BS: of the new tokens; int64, on the model's device.
    stop: T, the new length of the longest row.
    """

    def __init__(
        self, rows: Sequence[int], lengths: Sequence[int], new: int, device: torch.device | str
    ) -> None:
        assert len(rows) == len(lengths) == len(set(rows)) > 0, (rows, lengths)
        self.new = new
        self.stop = max(lengths) + new
        self.rows_B = torch.tensor(rows)
        self.lengths_B = torch.tensor(lengths)
        self.positions_BS = (self.lengths_B[:, None] + torch.arange(new)).to(device)
        # What a CPU goes by: see attend_cached.
        is_cpu = torch.device(device).type == "cpu"
        self.runs = list(_runs(rows, lengths)) if is_cpu else None
        self._angles: tuple[Tensor, Tensor] | None = None
        self._masks: dict[int | None, Tensor] = {}  # a model's layers have all the same window

    def angles(self, rotary: RotaryTable, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the new positions, [S, B, rotary_dim], looked up by the first layer."""
        if self._angles is None:
            self._angles = rotary.angles_at(self.positions_BS.t(), self.stop, like)
        return self._angles

    @cached_property
    def rows_on_device_B(self) -> Tensor:
        return self.rows_B.to(self.positions_BS.device)

    @cached_property
    def which(self) -> slice | Tensor:
        """What of a cache are these rows: neighbours as they are, others to be copied."""
        rows = self.rows_B.tolist()
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        return self.rows_on_device_B

    def mask(self, window: int | None, run: Run | None = None, first: int = 0) -> Tensor:
        """What the new positions see of those from `first` on: [B, 1, S, T], of a run [S, T]."""
        key = None if run is None else run.first
        if key not in self._masks:
            positions = self.positions_BS[:, None] if run is None else self.positions_BS[run.first]
            stop = self.stop if run is None else run.length + self.new
            distance = positions[..., None] - torch.arange(first, stop, device=positions.device)
            sees = distance >= 0
            self._masks[key] = sees if window is None else sees & (distance <= window)
        return self._masks[key]


class StaticSpan(Span):
    """All rows of a cache, a new position each, told by tensors alone but for `stop`.

    positions_R1: of the new tokens; `stop` is more than any, but for those of rows that are left
    out, whose numbers mean nothing.
    """

    def __init__(self, positions_R1: Tensor, stop: int) -> None:
        self.new, self.stop, self.runs = 1, stop, None
        self.positions_BS = positions_R1
        self.rows_on_device_B = torch.arange(len(positions_R1), device=positions_R1.device)
        self.which = slice(None)
        self._angles, self._masks = None, {}


@dataclass(frozen=True)
class Run:
    """Neighbours in the pass that are neighbours in the cache, too, and equally long."""

    batch: slice
    rows: slice
    length: int

    @property
    def first(self) -> int:
        """Its first row's place in the pass."""
        return int(self.batch.start)


def _runs(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[Run]:
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or (rows[i], lengths[i]) != (rows[i - 1] + 1, lengths[i - 1]):
            yield Run(slice(start, i), slice(rows[start], rows[start] + i - start), lengths[start])
            start = i


@dataclass(frozen=True)
class LayerCache:
    """One layer's memory, all rows of it, and what a pass does with it.

    keys_RKTD, values_RKTD: T is the most that a row can hold; positions that were not written
    hold anything on a CPU, and finite numbers elsewhere.
    """

    keys_RKTD: Tensor
    values_RKTD: Tensor
    span: Span


def attend_cached(
    q_BNSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, cache: LayerCache, window: int | None
) -> Tensor:
    """Store the new keys and values, and attend over each row's positions so far: [B, N, S, D].

    A query sees its own and earlier positions of its row, with a window the `window` before its
    own. On a CPU a row's numbers are those that it would have by itself, bit for bit.
    """
    if cache.span.runs is not None:
        return attend_by_runs(q_BNSD, k_BKSD, v_BKSD, cache, window)
    return attend_together(q_BNSD, k_BKSD, v_BKSD, cache, window)


def attend_by_runs(
    q_BNSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, cache: LayerCache, window: int | None
) -> Tensor:
    """`attend_cached` in the cache's own memory, for each run of equal rows: nothing is copied."""
    span = cache.span
    assert span.runs is not None
    contexts = []
    for run in span.runs:
        stop = run.length + span.new
        keys = cache.keys_RKTD[run.rows, :, :stop]
        values = cache.values_RKTD[run.rows, :, :stop]
        keys[:, :, run.length :] = k_BKSD[run.batch]
        values[:, :, run.length :] = v_BKSD[run.batch]
        first = 0 if window is None else max(0, run.length - window)  # that any query sees
        windowed = window is not None and window < stop - 1
        mask = None
        if span.new > 1 and (run.length > 0 or windowed):
            mask = span.mask(window, run, first)
        contexts.append(
            F.scaled_dot_product_attention(
                q_BNSD[run.batch],
                keys[:, :, first:],
                values[:, :, first:],
                attn_mask=mask,
                is_causal=mask is None and span.new > 1,
                enable_gqa=q_BNSD.shape[1] != k_BKSD.shape[1],
            )
        )
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def attend_together(
    q_BNSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, cache: LayerCache, window: int | None
) -> Tensor:
    """`attend_cached` of all rows at once, each as long as the longest, the rest masked.

    Few launches, and none that depends on a length: what a GPU wants. Neighbouring rows are read
    where they are, others are copied.
    """
    span = cache.span
    at = span.rows_on_device_B[:, None], slice(None), span.positions_BS
    cache.keys_RKTD[at] = k_BKSD.transpose(1, 2)
    cache.values_RKTD[at] = v_BKSD.transpose(1, 2)
    return F.scaled_dot_product_attention(
        q_BNSD,
        cache.keys_RKTD[span.which][:, :, : span.stop],
        cache.values_RKTD[span.which][:, :, : span.stop],
        attn_mask=span.mask(window),
        enable_gqa=q_BNSD.shape[1] != k_BKSD.shape[1],
    )
