"""The feed-forward layer, plain or gated, over this rank's slice of its inner width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.projection import project
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import column_linear, row_linear

# For a gated activation (GLU Variants, arXiv:2002.05202) this is the function of the gate.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "mish": F.mish,
    "silu": F.silu,
    "reglu": F.relu,
    "swiglu": F.silu,
    "bilinear": lambda x: x,
    "glu": torch.sigmoid,
}


class MLP(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        groups: ProcessGroups,
    ) -> None:
        super().__init__()
        self.gated = config.is_gated
        self.activation: Callable[[Tensor], Tensor] = (
            partial(F.gelu, approximate=config.gelu_approximation)
            if config.activation == "gelu"
            else ACTIVATIONS[config.activation]
        )
        hidden, ffn, bias = config.hidden_size, config.ffn_size, config.use_bias_in_mlp
        self.linear1 = column_linear(
            hidden,
            ffn * (2 if self.gated else 1),
            bias,
            dtype,
            groups,
        )
        self.linear2 = row_linear(ffn, hidden, bias, dtype, groups)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """This rank's inner activations, [S, B, ffn / tp]: the input of `linear2`."""
        inner = project(self.linear1, x_SBH)
        if self.gated:
            up, gate = inner.chunk(2, dim=-1)
            if not self.training:
                # torch's exact GELU gives one row, which has no gaps, other last bits than several
                # that have some, and an answer must not depend on its company.
                gate = gate.contiguous()
            return up * self.activation(gate)
        return self.activation(inner)
