"""A pass put together once and carried out by the kernels without a return to Python.

A small model spends more time between torch's operations than in them. Here the layers of a stage
are written down as a list of operations on fixed buffers, which one call of the kernels
(neox/kernels/decode.h) works off, its threads waiting for each other between them. It is the eager
pass in other words, and tests hold it to that. Every position is computed by itself, in whatever
company: of a prompt's chunk or of other rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.kernels import library as kernels
from neox.kernels.library import Operation
from neox.model.attention import Attention
from neox.model.block import Branch, TransformerLayer
from neox.model.gpt import Embedding, FinalNorm, Head, LocalLayers
from neox.model.mlp import MLP
from neox.model.norms import LayerNorm, Norm
from neox.model.packed import Packed
from neox.model.projection import adapter_of, bias_of, weight_of
from neox.parallel.groups import ProcessGroups

# config.activation -> the kernels' function; the others are left to the eager pass.
_FUNCTIONS = {"relu": "relu", "reglu": "relu", "silu": "silu", "swiglu": "silu", "swish": "silu"}
_FUNCTIONS |= {"bilinear": "none"}


def can_compile(config: ModelConfig, groups: ProcessGroups, stage: LocalLayers) -> bool:
    """Whether the kernels have everything that the stage does.

    That is a stage of packed weights without adapters, on a CPU, at tp 1.
    """
    if kernels.library() is None or groups.tp > 1 or _function(config) is None:
        return False
    matrices = [
        owner
        for _, module in stage
        if isinstance(module, nn.Module)
        for owner in module.modules()
        if isinstance(owner, nn.Linear)
    ]
    return all(
        isinstance(weight_of(owner), Packed) and adapter_of(owner) is None for owner in matrices
    )


def _function(config: ModelConfig) -> str | None:
    if config.activation in ("gelu", "geglu"):
        exact = config.activation == "geglu" or config.gelu_approximation == "none"
        return "gelu_erf" if exact else "gelu_tanh"
    return _FUNCTIONS.get(config.activation)


class CompiledPass:
    """The layers of a stage, for some new positions of rows of a cache."""

    def __init__(
        self, config: ModelConfig, stage: LocalLayers, keys: Tensor, values: Tensor, most: int
    ) -> None:
        """keys and values are the cache's, [layers, cache rows, kv heads, max_length, D].

        most: positions that are computed at a time; a pass may have more.
        """
        self.config = config
        self.most = most
        self._rows = keys.shape[1]
        self._cache = zip(keys, values, strict=True)
        self._angles: tuple[Tensor, Tensor] | None = None
        self._operations: list[Operation] = []
        self._kept: list[Any] = []  # what the operations point to
        self._begin_list(most)
        self._x = self._buffer(config.hidden_size)
        for _, module in stage:
            if isinstance(module, TransformerLayer):
                self._place = 1
                self._block(module)
        self._body = (Operation * len(self._operations))(*self._operations)
        self._begin_list(self._rows)
        self._head = self._x
        for layer, module in stage:
            if isinstance(module, FinalNorm):
                self._head = self._norm(module.norm, self._head)
            elif isinstance(module, Head):
                self._head = self._multiply(module.final_linear, self._head)
            elif isinstance(module, Embedding) and layer.forward is not None:
                self._head = self._multiply(module.word_embeddings, self._head)
        self._tail = (Operation * len(self._operations))(*self._operations)

    def _begin_list(self, positions: int) -> None:
        """What follows is on buffers of as many positions, of which the list before has none."""
        self._operations = []
        self._positions, self._place = positions, 0
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._kept.append(self._buffers)

    def __call__(
        self, x_PH: Tensor, rows_P: Tensor, lengths_P: Tensor, wanted: slice | None = None
    ) -> Tensor:
        """What the stage makes of P positions: [P, H], or on the last stage [P, V], float32.

        Position p is the lengths_P[p]-th of the cache's row rows_P[p], and is added there, those of
        a row in order; both are int64 on the CPU. On the last stage `wanted` are the positions
        whose logits are computed, as many as the cache has rows at most.
        """
        parts = []
        for start in range(0, len(x_PH), self.most):
            part = slice(start, start + self.most)
            self._run(self._body, x_PH[part], rows_P[part], lengths_P[part])
            parts.append(self._x[: len(x_PH[part])].clone())
        y_PH = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self._tail:
            return y_PH
        y_PH = y_PH if wanted is None else y_PH[wanted]
        if len(y_PH) == 0:
            return y_PH
        assert len(y_PH) <= self._rows, "the head's buffers are as long as the cache has rows"
        self._run(self._tail, y_PH, rows_P, lengths_P)
        return self._head[: len(y_PH)].clone()  # the next pass writes over it

    def _run(self, operations: Any, x_PH: Tensor, rows_P: Tensor, lengths_P: Tensor) -> None:
        assert rows_P.dtype == lengths_P.dtype == torch.int64
        library = kernels.library()
        assert library is not None
        self._x[: len(x_PH)] = x_PH
        rows, lengths = rows_P.contiguous(), lengths_P.contiguous()
        threads = torch.get_num_threads()
        library.neox_decode(
            operations, len(operations), rows.data_ptr(), lengths.data_ptr(), len(x_PH), threads
        )

    def _buffer(self, width: int) -> Tensor:
        """Memory for an operation's output; that of the next layer uses it again."""
        key = (self._place, width)
        self._place += 1
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._positions, width)
        return self._buffers[key]

    def _add(self, kind: int, x: Tensor, out: Tensor, **fields: Any) -> Tensor:
        """One more operation, from `x` to `out`; tensors among the fields become pointers."""
        pointers = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in fields.items()
        }
        self._kept.append(fields)
        self._operations.append(
            Operation(kind=kind, input=x.data_ptr(), output=out.data_ptr(), **pointers)
        )
        return out

    def _block(self, block: TransformerLayer) -> None:
        second_norm = block.post_attention_layernorm or block.input_layernorm
        attention = Branch(block.input_layernorm, block.attention, block.attention.dense)
        mlp = Branch(second_norm, block.mlp, block.mlp.linear2)
        x = self._x
        if block.parallel_residual:
            both = [self._branch(branch, x) for branch in (attention, mlp)]
            self._sum(both[0], both[1], both[0])
            self._sum(x, both[0], x)
        else:
            for branch in (attention, mlp):
                self._sum(x, self._branch(branch, x), x)

    def _branch(self, branch: Branch, x: Tensor) -> Tensor:
        normed = self._norm(branch.norm, x)
        if isinstance(branch.inner, Attention):
            inner = self._attend(branch.inner, normed)
        else:
            inner = self._inner(branch.inner, normed)
        return self._multiply(branch.row, inner)

    def _sum(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        self._add(kernels.ADD, x, out, second=y, width=x.shape[1])

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        out = self._buffer(x.shape[1])
        if isinstance(norm, LayerNorm):
            return self._add(
                kernels.LAYER_NORM,
                x,
                out,
                width=x.shape[1],
                weight=norm.weight,
                bias=norm.bias,
                epsilon=norm.epsilon,
            )
        return self._add(
            kernels.RMS_NORM, x, out, width=x.shape[1], weight=norm.scale, epsilon=norm.epsilon
        )

    def _multiply(self, owner: nn.Module, x: Tensor, function: str = "none") -> Tensor:
        weight, bias = weight_of(owner), bias_of(owner)
        assert isinstance(weight, Packed)
        matrix = weight.described(bias)
        self._kept += [weight, bias]
        return self._add(
            kernels.MULTIPLY,
            x,
            self._buffer(matrix.N),
            width=x.shape[1],
            matrix=matrix,
            function=kernels.FUNCTIONS[function],
        )

    def _inner(self, mlp: MLP, x: Tensor) -> Tensor:
        function = _function(self.config)
        assert function is not None
        if not mlp.gated:
            return self._multiply(mlp.linear1, x, function)
        both = self._multiply(mlp.linear1, x)
        width = both.shape[1] // 2
        out = self._buffer(width)
        return self._add(kernels.GATE, both, out, width=width, function=kernels.FUNCTIONS[function])

    def _attend(self, attention: Attention, x: Tensor) -> Tensor:
        qkv = self._multiply(attention.query_key_value, x)
        keys, values = next(self._cache)
        D, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        max_length = keys.shape[2]
        if kv_heads == heads:  # interleaved per head: see Attention
            strides = {"q_stride": 3 * D, "k_offset": D, "v_offset": 2 * D, "kv_stride": 3 * D}
        else:
            k_offset = heads * D
            v_offset = k_offset + kv_heads * D
            strides = {"q_stride": D, "k_offset": k_offset, "v_offset": v_offset, "kv_stride": D}
        turn: dict[str, Any] = {}
        if attention.rotary is not None:
            if self._angles is None:  # one table for all layers
                everywhere = torch.arange(max_length)
                self._angles = attention.rotary.angles_at(everywhere, max_length, x)
            turn = {"rotary_dim": attention.rotary.dim}
            turn |= {"cos": self._angles[0], "sin": self._angles[1]}
            turn["interleaved"] = int(attention.rotary.interleaved)
        return self._add(
            kernels.ATTEND,
            qkv,
            self._buffer(heads * D),
            width=qkv.shape[1],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=D,
            **strides,
            window=-1 if attention.window is None else attention.window,
            **turn,
            keys=keys,
            values=values,
            max_length=max_length,
        )
