"""One transformer layer, with the parallel residual of GPT-J and GPT-NeoX or the sequential one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.attention import Attention, LayerCache
from neox.model.mlp import MLP
from neox.model.norms import build_norm
from neox.model.positions import RotaryTable
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import copy_to_tensor_parallel, reduce_from_tensor_parallel
from neox.parallel.rng import DropoutStreams


class TransformerLayer(nn.Module):
    """x_SBH -> x_SBH.

    sequential: x = x + attention(norm1(x)); x = x + mlp(norm2(x))
    parallel:   x = x + attention(norm1(x)) + mlp(norm2(x))

    At tp > 1 the sequential form costs two all-reduces in each direction, the parallel one one.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        groups: ProcessGroups,
        rotary: RotaryTable | None,
        streams: DropoutStreams | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.parallel_residual = config.gpt_j_residual
        self.dropout = config.hidden_dropout
        reduce_input_grad = not self.parallel_residual
        self.input_layernorm = build_norm(config, dtype)
        self.attention = Attention(
            config, dtype, groups, rotary, streams, reduce_input_grad=reduce_input_grad
        )
        # GPT-NeoX-20B has two norms although both see the same input; gpt_j_tied shares the first.
        self.post_attention_layernorm = None if config.shares_norm else build_norm(config, dtype)
        self.mlp = MLP(config, dtype, groups, reduce_input_grad=reduce_input_grad)

    def forward(self, x_SBH: Tensor, cache: LayerCache | None = None) -> Tensor:
        if self.parallel_residual:
            return self._parallel(x_SBH, cache)
        return self._sequential(x_SBH, cache)

    def _sequential(self, x_SBH: Tensor, cache: LayerCache | None) -> Tensor:
        attention, mlp, second_norm = self.attention, self.mlp, self.post_attention_layernorm
        assert second_norm is not None
        context = attention(self.input_layernorm(x_SBH), cache)
        x_SBH = x_SBH + self._drop(attention.dense(context))
        return x_SBH + self._drop(mlp.linear2(mlp(second_norm(x_SBH))))

    def _parallel(self, x_SBH: Tensor, cache: LayerCache | None) -> Tensor:
        norms = [self.input_layernorm]
        if self.post_attention_layernorm is not None:
            norms.append(self.post_attention_layernorm)
        dense, linear2 = self.attention.dense, self.mlp.linear2
        # Everything replicated that this layer reads before its all-reduce: each rank finds only a
        # summand of their gradients, and they are summed together in one message.
        weights = [list(norm.parameters()) for norm in norms]
        biases = [linear.bias for linear in (dense, linear2) if isinstance(linear.bias, Tensor)]
        shared = copy_to_tensor_parallel(
            (x_SBH, *(weight for each in weights for weight in each), *biases), self.groups
        )
        replicas = iter(shared)
        x = next(replicas)
        normed = [
            norm.apply_with(x, *(next(replicas) for _ in each))
            for norm, each in zip(norms, weights, strict=True)
        ]
        # Row-parallel biases are added on every rank before the one all-reduce, each rank its 1/tp.
        dense_bias = next(replicas) if dense.bias is not None else None
        linear2_bias = next(replicas) if linear2.bias is not None else None
        context = self.attention(normed[0], cache)
        inner = self.mlp(normed[-1])
        summand = self._drop(self._row_summand(dense, context, dense_bias)) + self._drop(
            self._row_summand(linear2, inner, linear2_bias)
        )
        return x_SBH + reduce_from_tensor_parallel(summand, self.groups)

    def _row_summand(self, linear: nn.Module, x_local: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and self.groups.tp > 1:
            bias = bias / self.groups.tp
        return F.linear(x_local, linear.get_parameter("weight"), bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
