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

    See `reshard_into`; the result is a new tensor in the precision of the shards.
    """
    result = shards[0].new_empty(layout.shard_shape(tp))
    reshard_into(result, shards, layout, rank, tp)
    return result


def reshard_into(
    target: Tensor, shards: Sequence[Tensor], layout: ParamLayout, rank: int, tp: int
) -> None:
    """Fill `target` with what rank `rank` of `tp` holds, in its own precision and on its device.

    Only the slices that overlap are read, and they are copied once, so memory-mapped shards cost
    nothing besides the result. Replicas are averaged where they drifted apart (upstream's tools do
    so for norms); summands are added. Vocabulary rows beyond those stored are zeros; stored rows
    beyond those wanted are dropped.
    """
    if layout.split is Split.REPLICATED:
        target.copy_(_mean(shards))
        return
    if layout.split is Split.PARTIAL_SUM:
        target.copy_(_sum(shards))
        return
    dim = layout.dim
    assert dim is not None
    stored_sizes = _stored_blocks(shards, layout, dim)
    done = 0
    for block, size in enumerate(layout.block_sizes):
        width = size // tp
        for piece in _slices(shards, stored_sizes, block, dim, rank * width, (rank + 1) * width):
            target.narrow(dim, done, piece.shape[dim]).copy_(piece)
            done += piece.shape[dim]
        missing = sum(layout.block_sizes[: block + 1]) // tp - done
        target.narrow(dim, done, missing).zero_()
        done += missing


def file_shard(held: Tensor, layout: ParamLayout, rank: int, tp: int) -> Tensor:
    """What rank `rank` of `tp` writes to its file for the tensor that it holds in memory.

    Summands add up to the tensor exactly: rank 0 takes what the others' rounded shares leave, as
    in float16 a small number has no half.
    """
    if layout.split is not Split.PARTIAL_SUM or tp == 1:
        return held
    share = held / tp
    if rank > 0:
        return share
    return (held.double() - share.double() * (tp - 1)).to(held.dtype)


def _stored_blocks(shards: Sequence[Tensor], layout: ParamLayout, dim: int) -> list[int]:
    """The size of each block within one stored shard."""
    count = len(shards)
    if layout.is_vocab:
        return [shards[0].shape[dim]]
    return [size // count for size in layout.block_sizes]


def _slices(
    shards: Sequence[Tensor], stored: list[int], block: int, dim: int, start: int, stop: int
) -> list[Tensor]:
    """Rows [start, stop) of one block of the whole tensor as far as stored: views of the shards."""
    width, offset = stored[block], sum(stored[:block])
    pieces = []
    for index, tensor in enumerate(shards):
        first, last = max(start, index * width), min(stop, (index + 1) * width)
        if first < last:
            pieces.append(tensor.narrow(dim, offset + first - index * width, last - first))
    return pieces


def _mean(shards: Sequence[Tensor]) -> Tensor:
    first = shards[0]
    if all(torch.equal(first, other) for other in shards[1:]):
        return first
    return (_sum64(shards) / len(shards)).to(first.dtype)


def _sum(shards: Sequence[Tensor]) -> Tensor:
    return _sum64(shards).to(shards[0].dtype)


def _sum64(shards: Sequence[Tensor]) -> Tensor:
    """In double precision: adding up n equal n-ths of a float32 then gives it back exactly."""
    total = shards[0].double()
    for other in shards[1:]:
        total = total + other.double()
    return total
