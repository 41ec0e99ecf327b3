"""Weights for inference on a CPU, packed for the products that they are used in: 32, 8 or 4 bits.

At 32 bits a weight is what it was. At 8 and 4, consecutive elements of a row share a scale
(bfloat16), 64 or 32 of them, and activations are quantized to 8 bits as they come, with a scale for
each row and group, so that products are of integers and exact within a group: the kernels
(neox/kernels, which has the layout) and the torch code below give the same bits on every machine.
With either, a row's products do not depend on the other rows.

Shapes: N rows and K columns of the weight, both padded; G groups of a row, M rows of activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.kernels import library as kernels

GROUP = {32: 1, 8: 64, 4: 32}
_ZERO = {8: 128, 4: 8}  # the code of the value 0
_BLOCK = 16  # rows side by side
_PIECE = 1 << 24  # elements that are float32 at a time: 64 MB
_NOTHING = 1e-30  # magnitudes below it count as 0: their steps have no inverse


class Packed(nn.Module):
    """A weight [rows, columns] of `bits` bits, as integers: a model may be cast, and they are not.

    codes: uint8 [N / 16, bytes of a block]. scales: the bits of bfloat16, int16 [N / 16, G, 16];
    none at 32 bits.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, bits: int, rows: int, columns: int) -> None:
        """The place of a weight that `assign` puts there."""
        super().__init__()
        self.bits, self.shape = bits, torch.Size((rows, columns))
        codes = torch.empty(0, dtype=torch.uint8, device="meta")
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", codes.to(torch.int16), persistent=False)

    def assign(self, other: Packed) -> None:
        """Take over another's tensors, which are of the same shape."""
        assert (other.bits, other.shape) == (self.bits, self.shape)
        self.codes, self.scales = other.codes, other.scales

    @property
    def padded(self) -> tuple[int, int]:
        """N and K."""
        return _padded(self.bits, *self.shape)

    def described(self, bias: Tensor | None) -> kernels.Matrix:
        """For the kernels; the tensors have to outlive it."""
        rows, columns = self.shape
        _, K = self.padded
        return kernels.matrix(self.bits, self.codes, self.scales, bias, (rows, columns, K))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: float32 [..., columns] -> [..., rows]; has no gradient."""
        if kernels.library() is not None:
            return kernels.multiply(x, self.described(bias))
        if self.bits == 32:
            return F.linear(x, self.dequantize(), bias)
        rows = x.flatten(0, -2)
        parts = [
            _multiply(rows, self.bits, self.padded[1], self.codes[here], self.scales[here])
            for here in self._pieces()
        ]
        y = torch.cat(parts, dim=1)
        y = y[:, : self.shape[0]].unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Row indices [...] -> their rows, [..., columns]."""
        K = self.padded[1]
        # The lane is chosen before anything is unpacked: a block is 16 rows, and one is wanted.
        at = rows.flatten() // _BLOCK, slice(None), rows.flatten() % _BLOCK
        if self.bits == 32:
            values = self.codes.view(torch.float32).unflatten(1, (K, _BLOCK))[at]
        else:
            codes = self.codes.view(len(self.codes), -1, _BLOCK, 4)[at]  # [..., K / 4 or K / 8, 4]
            if self.bits == 4:
                codes = torch.stack((codes & 15, codes >> 4), dim=2)
            steps = self.scales.view(torch.bfloat16)[at].float()
            values = codes.flatten(1).float() - _ZERO[self.bits]
            values *= steps.repeat_interleave(GROUP[self.bits], dim=1)
        return values[:, : self.shape[1]].to(dtype).unflatten(0, rows.shape)

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        K = self.padded[1]
        whole = torch.empty(*self.codes.shape[:1], _BLOCK, K)
        for here in self._pieces():
            whole[here] = _values(self.bits, K, self.codes[here], self.scales[here])
        return whole.flatten(0, 1)[: self.shape[0], : self.shape[1]]

    def _pieces(self) -> Iterator[slice]:
        """Blocks that are float32 at a time."""
        size = max(1, _PIECE // (_BLOCK * self.padded[1]))
        for start in range(0, len(self.codes), size):
            yield slice(start, start + size)


def pack(weight: Tensor, bits: int) -> Packed:
    """Pack a floating-point weight on the CPU, some rows at a time.

    32 bits: as it is, in float32. 8 bits: the largest magnitude of a group is at most 127 steps.
    4 bits: of eight scales, each refined to the best for the codes that it gives, the one of least
    squared error. Both raise ValueError for a weight that has other than finite numbers.
    """
    rows, columns = weight.shape
    N, K = _padded(bits, rows, columns)
    made = Packed(bits, rows, columns)
    codes = _large_pages(torch.empty(N // _BLOCK, _BLOCK * K * bits // 8, dtype=torch.uint8))
    groups = 0 if bits == 32 else K // GROUP[bits]
    scales = torch.empty(N // _BLOCK, groups, _BLOCK, dtype=torch.int16)
    size = max(1, _PIECE // (_BLOCK * K))  # blocks
    for block in range(0, N // _BLOCK, size):
        here = slice(block, block + size)
        part = weight[block * _BLOCK : (block + size) * _BLOCK].float().contiguous()
        if bits == 32:
            blocks = F.pad(part, (0, 0, 0, -len(part) % _BLOCK)).unflatten(0, (-1, _BLOCK))
            codes[here].view(torch.float32).unflatten(1, (K, _BLOCK)).copy_(blocks.transpose(1, 2))
            continue
        if not part.sum().isfinite():
            raise ValueError("has numbers that are not finite")
        if kernels.library() is not None:
            kernels.pack(part, bits, K, codes[here], scales[here])
        else:
            part = F.pad(part, (0, K - columns, 0, -len(part) % _BLOCK))
            codes[here], scales[here] = _packed(part.unflatten(1, (-1, GROUP[bits])), bits)
    made.codes, made.scales = codes, scales
    return made


def _padded(bits: int, rows: int, columns: int) -> tuple[int, int]:
    return rows + -rows % _BLOCK, columns + -columns % GROUP[bits]


def _large_pages(tensor: Tensor) -> Tensor:
    kernels.advise_large_pages(tensor)
    return tensor


def _values(bits: int, K: int, codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [blocks, 16, K] of some blocks."""
    if bits == 32:
        return codes.view(torch.float32).unflatten(1, (K, _BLOCK)).transpose(1, 2)
    values, steps = _unpacked(bits, K, codes, scales)
    return values * steps.repeat_interleave(GROUP[bits], dim=-1)


def _unpacked(bits: int, K: int, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The values in steps, [blocks, 16, K], and the steps, [blocks, 16, G]: float32."""
    if bits == 8:
        values = codes.view(-1, K // 4, _BLOCK, 4)
    else:
        both = codes.view(-1, K // 8, _BLOCK, 1, 4)
        values = torch.cat((both & 15, both >> 4), dim=3)  # [blocks, K / 8, 16, 2, 4]
    values = values.transpose(1, 2).flatten(2).float() - _ZERO[bits]
    return values, scales.view(torch.bfloat16).float().transpose(1, 2)


def _packed(w_NGg: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales in the kernels' layout, of whole groups and blocks."""
    q_NGg, scales_NG = _eight_bits(w_NGg) if bits == 8 else _four_bits(w_NGg)
    codes_NK = (q_NGg + _ZERO[bits]).to(torch.uint8).flatten(1)
    if bits == 8:
        codes = codes_NK.unflatten(1, (-1, 4)).unflatten(0, (-1, _BLOCK))
    else:
        halves = codes_NK.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, _BLOCK))
        codes = halves[..., 0, :] | halves[..., 1, :] << 4
    scales = scales_NG.view(torch.int16).unflatten(0, (-1, _BLOCK)).transpose(1, 2)
    return codes.transpose(1, 2).flatten(1), scales


def _eight_bits(w_NGg: Tensor) -> tuple[Tensor, Tensor]:
    """Values in steps, and the steps in bfloat16."""
    most_NG = w_NGg.abs().amax(dim=-1)
    bits = (most_NG / 127.0).view(torch.int32) + 0xFFFF >> 16  # upwards
    scales_NG = bits.masked_fill(most_NG < _NOTHING, 0).to(torch.int16).view(torch.bfloat16)
    return (w_NGg * _inverse(scales_NG)).round(), scales_NG


def _four_bits(w_NGg: Tensor) -> tuple[Tensor, Tensor]:
    """Values in steps, and the steps in bfloat16: what scales_of_4 of quantize.h does."""
    peak_NG1 = w_NGg.gather(-1, w_NGg.abs().argmax(dim=-1, keepdim=True))
    something = (peak_NG1.abs() > _NOTHING)[..., 0]
    best = torch.full_like(peak_NG1[..., 0], -1.0)
    scales = torch.zeros_like(best, dtype=torch.bfloat16)
    for i in range(8):
        steps_to_peak = torch.full_like(peak_NG1, -8.75 + 0.25 * i)
        q = (w_NGg * (steps_to_peak / peak_NG1)).round().clamp(-8.0, 7.0)
        products, squares = _total(w_NGg * q), _total(q * q)
        gain = products * products / squares
        better = something & (gain > best)
        best = torch.where(better, gain, best)
        scales = torch.where(better, (products / squares).bfloat16(), scales)
    return (w_NGg * _inverse(scales)).round().clamp(-8.0, 7.0), scales


def _inverse(scales_NG: Tensor) -> Tensor:
    steps = scales_NG.float()
    return torch.where(steps == 0, 0.0, 1.0 / steps)[..., None]


def _total(values: Tensor) -> Tensor:
    """The sum over the last dimension, one after the other: the kernels' order."""
    total = torch.zeros_like(values[..., 0])
    for value in values.unbind(-1):
        total += value
    return total


def _multiply(x: Tensor, bits: int, K: int, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, columns] times some blocks: float32 [M, 16 * blocks]."""
    group = GROUP[bits]
    values, steps = _unpacked(bits, K, codes, scales)
    x_MGg = F.pad(x, (0, K - x.shape[1])).unflatten(1, (-1, group))
    most_MG1 = x_MGg.abs().amax(dim=-1, keepdim=True)
    usable = (most_MG1 >= _NOTHING) & most_MG1.isfinite()
    # Two tensors: torch divides a number by one as number * (1 / tensor), which rounds twice.
    inverse = torch.full_like(most_MG1, 127.0) / most_MG1
    q_MGg = torch.where(usable, (x_MGg * inverse).round(), 0.0)
    scale_MG = most_MG1[..., 0] / 127.0
    values_NGg = values.flatten(0, 1).unflatten(1, (-1, group))
    steps_NG = steps.flatten(0, 1)
    total_MN = torch.zeros(len(x), len(values_NGg))
    for g in range(values_NGg.shape[1]):
        # Exact in float32, in any order: 64 products of at most 2^14 stay below 2^24.
        sum_MN = q_MGg[:, g] @ values_NGg[:, g].t()
        total_MN += (sum_MN * scale_MG[:, g, None]) * steps_NG[:, g]
    return total_MN
