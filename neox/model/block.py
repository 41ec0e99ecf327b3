"""One transformer layer, with the parallel residual of GPT-J and GPT-NeoX or the sequential one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.attention import Attention
from neox.model.cached_attention import LayerCache
from neox.model.mlp import MLP
from neox.model.norms import Norm, build_norm
from neox.model.packing import Packing
from neox.model.positions import RotaryTable
from neox.model.projection import bias_of, project_with
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


class Branch(NamedTuple):
    """norm -> inner -> row: what is added to the residual stream. `row` sums over the ranks."""

    norm: Norm
    inner: Attention | MLP
    row: nn.Module


class TransformerLayer(nn.Module):
    """x_SBH -> x_SBH; with sequence parallelism, both are shards [S / tp, B, H].

    sequential: x = x + attention(norm1(x)); x = x + mlp(norm2(x))
    parallel:   x = x + attention(norm1(x)) + mlp(norm2(x))

    At tp > 1 the sequential form costs two all-reduces in each direction, the parallel one one;
    with sequence parallelism, each is an all-gather and a reduce-scatter.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        groups: ProcessGroups,
        rotary: RotaryTable | None,
        streams: DropoutStreams | None,
        region: TensorParallelRegion,
    ) -> None:
        super().__init__()
        self.region = region
        self.parallel_residual = config.gpt_j_residual
        self.dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config, dtype)
        self.attention = Attention(config, dtype, groups, rotary, streams)
        # GPT-NeoX-20B has two norms although both see the same input; gpt_j_tied shares the first.
        self.post_attention_layernorm = None if config.shares_norm else build_norm(config, dtype)
        self.mlp = MLP(config, dtype, groups)

    def forward(
        self,
        x_SBH: Tensor,
        cache: LayerCache | None = None,
        packing: Packing | None = None,
        wanted_U: Tensor | None = None,
    ) -> Tensor:
        """With `wanted_U`, of those positions only, which the others then only serve: x_UBH."""
        second_norm = self.post_attention_layernorm or self.input_layernorm
        attention = Branch(self.input_layernorm, self.attention, self.attention.dense)
        mlp = Branch(second_norm, self.mlp, self.mlp.linear2)
        if self.parallel_residual:
            return self._add(x_SBH, (attention, mlp), cache, packing, wanted_U)
        x_UBH = self._add(x_SBH, (attention,), cache, packing, wanted_U)
        return self._add(x_UBH, (mlp,))

    def _add(
        self,
        x_SBH: Tensor,
        branches: tuple[Branch, ...],
        cache: LayerCache | None = None,
        packing: Packing | None = None,
        wanted_U: Tensor | None = None,
    ) -> Tensor:
        """x plus the branches, all of which see x."""
        # Everything replicated that is read before the sum over the ranks: each rank finds only a
        # summand of their gradients, and they are summed together in one message.
        replicas = {
            id(parameter): parameter
            for branch in branches
            for parameter in (*branch.norm.parameters(), branch.row.bias)
            if isinstance(parameter, Tensor) and parameter.requires_grad
        }
        whole, *copies = self.region.enter(x_SBH, *replicas.values())
        replica = dict(zip(replicas, copies, strict=True))
        normed: dict[int, Tensor] = {}
        total = None
        for norm, inner, row in branches:
            if id(norm) not in normed:
                weights = (replica.get(id(weight), weight) for weight in norm.parameters())
                normed[id(norm)] = norm.apply_with(whole, *weights)
            x = normed[id(norm)]
            if isinstance(inner, Attention):
                x_local = _of(inner(x, cache, packing), wanted_U)
            else:
                x_local = inner(_of(x, wanted_U))
            bias = bias_of(row)
            bias = replica.get(id(bias), bias)
            summand = self._drop(self._row_summand(row, x_local, bias))
            total = summand if total is None else total + summand
        assert total is not None
        return _of(x_SBH, wanted_U) + self.region.leave(total)

    def _row_summand(self, row: nn.Module, x_local: Tensor, bias: Tensor | None) -> Tensor:
        """Biases are added on every rank before the one sum over the ranks, by each rank its 1/tp.

        Every rank drops the same elements, so the sum drops them.
        """
        if bias is not None and self.region.tp > 1:
            bias = bias / self.region.tp
        return project_with(row, x_local, bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _of(x_SBH: Tensor, wanted_U: Tensor | None) -> Tensor:
    return x_SBH if wanted_U is None else x_SBH[wanted_U]
