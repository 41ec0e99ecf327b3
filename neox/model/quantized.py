"""Frozen weights of 8 bits: bitsandbytes' block-wise tensors, dequantized just in time.

An element is table[code] * scale, where the scale is that of a block: 4096 consecutive elements of
the whole tensor, across rows (Dettmers et al., arXiv:2110.02861). This is storage only: products
are made in the precision of the activations, with some rows of the weight at a time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neox.model.layout import ParamLayout, Split
from neox.model.shard import shard
from neox.parallel.layers import linear

BLOCK = 4096
_PIECE = 1 << 24  # elements that exist dequantized at a time: 64 MB in float32
_KERNEL_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has on CUDA


class EightBit(nn.Module):
    """A weight [N, K]: codes uint8 [N, K], scales float32 [N, K / g], table float32 [256].

    g consecutive elements of a row share a scale. g divides the block and the row, so that rows,
    and columns by g, can be cut, joined and rearranged together with their scales.
    """

    codes: Tensor
    _scale_bits: Tensor
    _table_bits: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, table: Tensor) -> None:
        super().__init__()
        self._hold(codes, scales, table)

    def _hold(self, codes: Tensor, scales: Tensor, table: Tensor) -> None:
        assert codes.dtype == torch.uint8 and codes.dim() == scales.dim() == 2
        assert len(codes) == len(scales) and codes.shape[1] % scales.shape[1] == 0
        self.register_buffer("codes", codes, persistent=False)
        # As bits, since a model that is cast to 16 bits casts all of its floating-point buffers.
        self.register_buffer("_scale_bits", scales.contiguous().view(torch.int32), persistent=False)
        self.register_buffer("_table_bits", table.contiguous().view(torch.int32), persistent=False)

    @classmethod
    def empty(cls, rows: int, columns: int) -> EightBit:
        """The place of a weight that `assign` puts there."""
        codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
        return cls(codes, torch.empty(rows, 1, device="meta"), torch.empty(256, device="meta"))

    def assign(self, other: EightBit) -> None:
        """Take over another's tensors, which are of the same shape."""
        assert other.shape == self.shape, (other.shape, self.shape)
        self._hold(other.codes, other.scales, other.table)

    @property
    def scales(self) -> Tensor:
        return self._scale_bits.view(torch.float32)

    @property
    def table(self) -> Tensor:
        return self._table_bits.view(torch.float32)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def group(self) -> int:
        """Elements that share a scale: g."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], bit for bit bitsandbytes' in float32."""
        return self._dequantized(self.codes, self.scales, dtype)

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Row indices [...] -> their rows, [..., K]."""
        found = self._dequantized(self.codes[rows.flatten()], self.scales[rows.flatten()], dtype)
        return found.view(*rows.shape, self.shape[1])

    def refined(self, group: int) -> EightBit:
        """The same weight with a scale for each `group` elements, which divides g."""
        assert self.group % group == 0, (self.group, group)
        if group == self.group:
            return self
        scales = self.scales.repeat_interleave(self.group // group, dim=1)
        return EightBit(self.codes, scales, self.table)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, these rows dequantized), one piece after the other."""
        size = max(1, _PIECE // self.shape[1])
        for start in range(0, len(self.codes), size):
            rows = slice(start, start + size)
            yield rows, self._dequantized(self.codes[rows], self.scales[rows], dtype)

    def _dequantized(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        group = self.group
        if codes.is_cuda and group not in _KERNEL_BLOCKS:
            values = self.table[codes.int()].view(*scales.shape, group) * scales[..., None]
            return values.view(codes.shape).to(dtype)
        bnb = bitsandbytes().functional
        state = bnb.QuantState(scales.flatten(), code=self.table, blocksize=group, dtype=dtype)
        dequantized: Tensor = bnb.dequantize_blockwise(codes.contiguous(), quant_state=state)
        return dequantized


def quantize(weight: Tensor) -> EightBit:
    """A whole weight [N, K] of any floating-point type, as hivemind's models have it."""
    bnb = bitsandbytes().functional
    table = bnb.create_dynamic_map(signed=True).to(weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    flat, flat_codes = weight.reshape(-1), codes.view(-1)
    scales = []
    for start in range(0, flat.numel(), _PIECE):  # whole blocks: their size divides it
        part = slice(start, start + _PIECE)
        made, state = bnb.quantize_blockwise(flat[part].float(), code=table, blocksize=BLOCK)
        flat_codes[part] = made
        scales.append(state.absmax)
    return from_blocks(codes, torch.cat(scales), table)


def from_blocks(codes: Tensor, absmax: Tensor, table: Tensor) -> EightBit:
    """bitsandbytes' tensors of a weight: a scale, float32, for each 4096 elements of the whole."""
    rows, columns = codes.shape
    group = math.gcd(BLOCK, columns)
    scales = absmax.repeat_interleave(BLOCK // group)[: codes.numel() // group]
    return EightBit(codes, scales.view(rows, columns // group), table)


def join_rows(parts: Sequence[EightBit]) -> EightBit:
    """Whole weights of the same width and table one below the other."""
    return EightBit(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        parts[0].table,
    )


def cut(whole: EightBit, layout: ParamLayout, rank: int, tp: int) -> EightBit:
    """What rank `rank` of `tp` holds of a weight; the blocks stay those of the whole weight.

    Rows of the vocabulary beyond the whole weight's are zeros.
    """
    if layout.split is Split.ROW:
        whole = whole.refined(math.gcd(whole.group, whole.shape[1] // tp))
    of_scales = replace(layout, shape=(layout.shape[0], whole.scales.shape[1]))
    scales = shard(whole.scales, of_scales, rank, tp)
    return EightBit(shard(whole.codes, layout, rank, tp), scales, whole.table)


def multiply(x: Tensor, weight: EightBit) -> Tensor:
    """x W^T: [..., K] -> [..., N]; has no gradient."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows, dense in weight.pieces(x.dtype):
        y[..., rows] = linear(x, dense)
    return y


def multiply_back(grad: Tensor, weight: EightBit) -> Tensor:
    """grad W: [..., N] -> [..., K]; has no gradient."""
    total = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    for rows, dense in weight.pieces(grad.dtype):
        total += linear(grad[..., rows], dense.t())
    return total


@functools.cache
def bitsandbytes() -> Any:
    """The library, which takes seconds to import."""
    with silently():
        import bitsandbytes as library
    return library


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """bitsandbytes, while it is imported, without its lines on kernels of further packages."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
