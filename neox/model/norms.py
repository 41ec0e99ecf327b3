"""Normalisation layers; parameters are filled by neox.model.init or a checkpoint."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig


class LayerNorm(nn.Module):
    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(x, self.weight, self.bias)

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / (rms(x) + epsilon) * scale: epsilon is added to the root, as upstream's norms.py does."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scale = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(x, self.scale)

    def apply_with(self, x: Tensor, scale: Tensor) -> Tensor:
        # The norm of a row of zeros has gradient 0 in torch; the root of its mean square has NaN.
        norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        rms = norm / math.sqrt(x.shape[-1])
        return (x.float() / (rms + self.epsilon)).to(x.dtype) * scale


Norm = LayerNorm | RMSNorm


def build_norm(config: ModelConfig, dtype: torch.dtype) -> Norm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.rms_norm_epsilon, dtype)
    return LayerNorm(config.hidden_size, config.layernorm_epsilon, dtype)
