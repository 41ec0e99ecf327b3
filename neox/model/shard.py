"""Cutting whole tensors into a rank's shard and joining shards again: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neox.model.layout import ParamLayout, Split


def shard(whole: Tensor, layout: ParamLayout, rank: int, tp: int) -> Tensor:
    """What rank `rank` of `tp` holds in memory: a copy of its slices, or the whole tensor."""
    return reshard([whole], layout, rank, tp)


def reshard(shards: Sequence[Tensor], layout: ParamLayout, rank: int, tp: int) -> Tensor:
    """What rank `rank` of `tp` holds, from the files of any other number of shards.

    Only the slices that overlap are read, so memory-mapped shards cost no more than the result.
    Replicas are averaged where they drifted apart (upstream's tools do so for norms); summands are
    added. Vocabulary rows beyond those stored are zeros; stored rows beyond those wanted are
    dropped.
    """
    if layout.split is Split.REPLICATED:
        return _mean(shards)
    if layout.split is Split.PARTIAL_SUM:
        return _sum(shards)
    dim = layout.dim
    assert dim is not None
    pieces = []
    stored_sizes = _stored_blocks(shards, layout, dim)
    for block, size in enumerate(layout.block_sizes):
        width = size // tp
        start, stop = rank * width, (rank + 1) * width
        pieces += _slices(shards, stored_sizes, block, dim, start, stop)
    return pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces, dim)


def file_shard(held: Tensor, layout: ParamLayout, tp: int) -> Tensor:
    """What a rank writes to its file for the tensor that it holds in memory."""
    if layout.split is Split.PARTIAL_SUM and tp > 1:
        return held / tp
    return held


def _stored_blocks(shards: Sequence[Tensor], layout: ParamLayout, dim: int) -> list[int]:
    """The size of each block within one stored shard."""
    count = len(shards)
    if layout.is_vocab:
        return [shards[0].shape[dim]]
    return [size // count for size in layout.block_sizes]


def _slices(
    shards: Sequence[Tensor], stored: list[int], block: int, dim: int, start: int, stop: int
) -> list[Tensor]:
    """Rows [start, stop) of one block of the whole tensor, as views of the shards."""
    width, offset = stored[block], sum(stored[:block])
    pieces = []
    for index, tensor in enumerate(shards):
        first, last = max(start, index * width), min(stop, (index + 1) * width)
        if first < last:
            pieces.append(tensor.narrow(dim, offset + first - index * width, last - first))
    missing = (stop - start) - sum(piece.shape[dim] for piece in pieces)
    if missing:
        shape = list(shards[0].shape)
        shape[dim] = missing
        pieces.append(shards[0].new_zeros(shape))
    return pieces


def _mean(shards: Sequence[Tensor]) -> Tensor:
    first = shards[0]
    if all(torch.equal(first, other) for other in shards[1:]):
        return first.clone()
    return (_sum64(shards) / len(shards)).to(first.dtype)


def _sum(shards: Sequence[Tensor]) -> Tensor:
    return _sum64(shards).to(shards[0].dtype)


def _sum64(shards: Sequence[Tensor]) -> Tensor:
    """In double precision: adding up n equal n-ths of a float32 then gives it back exactly."""
    total = shards[0].double()
    for other in shards[1:]:
        total = total + other.double()
    return total
