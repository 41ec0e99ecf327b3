"""Rotary position embedding (RoFormer, arXiv:2104.09864), on pairs as GPT-NeoX's or as GPT-J's.

Of a head's first rotary_dim elements, NeoX turns i with i + rotary_dim / 2, and GPT-J
(`rotary_interleaved`) 2i with 2i + 1. The angle of pair i is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neox.config import ModelConfig

Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class RotaryTable:
    """cos and sin of every position, computed in float32 and grown as positions are asked for.

    One table is shared by the layers of a model. It is not a module: casting the model to 16 bit
    must not cast the angles, and checkpoints do not hold them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.dim = config.rotary_dim
        self.interleaved = config.rotary_interleaved
        self._base = config.rotary_emb_base
        self._cos_TD = self._sin_TD = torch.empty(0, self.dim)

    def angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the first positions, each [length, 1, rotary_dim]; dtype as `like`."""
        cos_SD, sin_SD = self._take(slice(length), length, like)
        return cos_SD[:, None], sin_SD[:, None]

    def angles_at(self, positions_SB: Tensor, longest: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`angles` of any positions below `longest`, each [S, B, rotary_dim]."""
        return self._take(positions_SB, longest, like)

    def _take(self, which: slice | Tensor, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._cos_TD.shape[0] < stop or self._cos_TD.device != like.device:
            self._grow(max(stop, 2 * self._cos_TD.shape[0]), like.device)
        return self._cos_TD[which].to(like.dtype), self._sin_TD[which].to(like.dtype)

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


def rotate_(
    parts: Split, heads: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, interleaved: bool = False
) -> Tensor:
    """Turn the first rotary_dim elements of every query and key head, in the memory of `heads`.

    `heads` is what the projection made, [S, B, ...]; `parts` gives its views of queries, keys and
    values, [S, B, heads, D]. Angles are [S, B, rotary_dim], or [S, 1, rotary_dim] if they are those
    of all B. In place, because copies of all heads would be a quarter of what a layer keeps for its
    backward pass.
    """
    if torch.is_grad_enabled():
        return _Rotation.apply(parts, heads, cos_SBD, sin_SBD, interleaved)
    return _rotated_(parts, heads, cos_SBD, sin_SBD, interleaved)


def _rotated_(
    parts: Split, heads: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, interleaved: bool
) -> Tensor:
    for part in parts(heads)[:2]:
        _turn_(part, cos_SBD, sin_SBD, interleaved)
    return heads


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Split,
        heads: Tensor,
        cos_SBD: Tensor,
        sin_SBD: Tensor,
        interleaved: bool,
    ) -> Tensor:
        ctx.parts, ctx.angles, ctx.interleaved = parts, (cos_SBD, sin_SBD), interleaved
        ctx.mark_dirty(heads)
        return _rotated_(parts, heads, cos_SBD, sin_SBD, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos_SBD, sin_SBD = ctx.angles
        grad = grad.clone()
        for part in ctx.parts(grad)[:2]:
            _turn_(part, cos_SBD, -sin_SBD, ctx.interleaved)
        return None, grad, None, None, None


def _turn_(x_SBND: Tensor, cos_SBD: Tensor, sin_SBD: Tensor, interleaved: bool) -> None:
    """The pairs are those of the module's docstring."""
    half = cos_SBD.shape[-1] // 2
    cos, sin = (angles[:, :, None, :half] for angles in (cos_SBD, sin_SBD))
    if interleaved:
        first, second = x_SBND[..., : 2 * half].unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = x_SBND[..., : 2 * half].chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.mul_(cos).add_(first * sin)
    first.copy_(turned)
