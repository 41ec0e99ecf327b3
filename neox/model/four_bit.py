"""Weights of 4 bits for inference on CUDA: bitsandbytes' NF4 (Dettmers et al., arXiv:2305.14314).

64 consecutive elements of a row share a scale, and each is one of 16 numbers times it, those that
normally distributed weights come near. The library chooses by the rows of activations whether its
kernel reads the 4 bits or the whole weight is dequantized just in time. It computes the same on a
CPU, slowly: what is meant for CPUs is neox.model.packed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.model.quantized import bitsandbytes

BLOCK = 64


class FourBit(nn.Module):
    """A weight [N, K]: codes uint8 [N, K' / 2], scales float32 [N, K' / 64]; K' is K padded to 64.

    Rows begin with a scale of their own, so that some of them are a weight, too.
    """

    codes: Tensor
    _scale_bits: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        """The place of a weight that `assign` puts there."""
        super().__init__()
        self.shape = torch.Size((rows, columns))
        codes = torch.empty(0, dtype=torch.uint8, device="meta")
        self.register_buffer("codes", codes, persistent=False)
        # As bits, since a model that is cast to 16 bits casts all of its floating-point buffers.
        self.register_buffer("_scale_bits", codes.to(torch.int32), persistent=False)

    def assign(self, other: FourBit) -> None:
        """Take over another's tensors, which are of the same shape."""
        assert other.shape == self.shape, (other.shape, self.shape)
        self.codes, self._scale_bits = other.codes, other._scale_bits

    @property
    def scales(self) -> Tensor:
        return self._scale_bits.view(torch.float32)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., K] -> [..., N]; has no gradient."""
        padded = F.pad(x, (0, 2 * self.codes.shape[1] - x.shape[-1]))
        state = _state(self.codes, self.scales, x.dtype)
        y: Tensor = bitsandbytes().matmul_4bit(padded, self.codes, state, bias=bias)
        return y

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Row indices [...] -> their rows, [..., K]."""
        codes, scales = self.codes[rows.flatten()], self.scales[rows.flatten()]
        return self._dequantized(codes, scales, dtype).unflatten(0, rows.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]."""
        return self._dequantized(self.codes, self.scales, dtype)

    def _dequantized(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        state = _state(codes, scales, dtype)
        values: Tensor = bitsandbytes().functional.dequantize_4bit(codes.view(-1, 1), state)
        return values[:, : self.shape[1]]


def quantize_to_4(weight: Tensor) -> FourBit:
    """A floating-point weight [N, K], some rows at a time.

    Raises ValueError for a weight that has other than finite numbers.
    """
    rows, columns = weight.shape
    made = FourBit(rows, columns)
    codes, scales = [], []
    for part in weight.split(max(1, (1 << 24) // columns)):  # 64 MB in float32
        padded = F.pad(part.float(), (0, -columns % BLOCK))
        if not padded.sum().isfinite():
            raise ValueError("has numbers that are not finite")
        found, state = bitsandbytes().functional.quantize_4bit(
            padded, blocksize=BLOCK, quant_type="nf4"
        )
        codes.append(found.view(len(part), -1))
        scales.append(state.absmax.view(len(part), -1))
    made.codes, made._scale_bits = torch.cat(codes), torch.cat(scales).view(torch.int32)
    return made


def _state(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
    """How bitsandbytes is told what the codes are."""
    rows, half = codes.shape
    return bitsandbytes().functional.QuantState(
        scales.flatten(),
        shape=torch.Size((rows, 2 * half)),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type="nf4",
    )
