"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split form of GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor

from neox.config import ModelConfig


class RotaryTable:
    """cos and sin of every position, computed in float32 and grown as positions are asked for.

    One table is shared by the layers of a model. It is not a module: casting the model to 16 bit
    must not cast the angles, and checkpoints do not hold them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.dim = config.rotary_dim
        self._base = config.rotary_emb_base
        self._cos_TD = self._sin_TD = torch.empty(0, self.dim)

    def angles(self, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, rotary_dim], from position `start` on; dtype as `like`."""
        stop = start + length
        if self._cos_TD.shape[0] < stop or self._cos_TD.device != like.device:
            self._grow(max(stop, 2 * self._cos_TD.shape[0]), like.device)
        cos, sin = self._cos_TD[start:stop], self._sin_TD[start:stop]
        return cos.to(like.dtype), sin.to(like.dtype)

    @torch.inference_mode(False)  # training may use what an evaluation was the first to need
    def _grow(self, length: int, device: torch.device) -> None:
        positions = torch.arange(length, dtype=torch.float32)
        angles = torch.outer(positions, frequencies(self.dim, self._base))
        angles = torch.cat((angles, angles), dim=-1)
        self._cos_TD, self._sin_TD = angles.cos().to(device), angles.sin().to(device)


def frequencies(dim: int, base: int) -> Tensor:
    """By how much each pair of dimensions turns from a position to the next: float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / (base**exponents)


def rotate(x_SBND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of each head; the rest pass through."""
    dim = cos_SD.shape[-1]
    cos, sin = cos_SD[:, None, None, :], sin_SD[:, None, None, :]
    turned, rest = x_SBND[..., :dim], x_SBND[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
