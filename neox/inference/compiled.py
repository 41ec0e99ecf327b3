"""A pass put together once and carried out by the kernels without a return to Python.

A small model spends more time between torch's operations than in them. Here the layers of a stage
are written down as a list of operations on fixed buffers, which one call of the kernels
(neox/kernels/decode.h) works off, its threads waiting for each other between them. It is the eager
pass in other words, and tests hold it to that. Every position is computed by itself, in whatever
company: of a prompt's chunk or of other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.kernels import library as kernels
from neox.kernels.library import Operation
from neox.model.attention import Attention
from neox.model.block import TransformerLayer
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


@dataclass(frozen=True)
class Program:
    """Operations on fixed buffers: from `x` to `out`, [positions, width], float32."""

    operations: Any  # a ctypes array of Operation
    x: Tensor
    out: Tensor
    kept: list[Tensor]  # what the operations point to

    def run(self, x_PH: Tensor, rows_P: Tensor, lengths_P: Tensor) -> Tensor:
        """What they make of P positions, as many as `x` has at most; a view of `out`."""
        assert rows_P.dtype == lengths_P.dtype == torch.int64
        library = kernels.library()
        assert library is not None
        count = len(x_PH)
        self.x[:count] = x_PH
        rows, lengths = rows_P.contiguous(), lengths_P.contiguous()
        library.neox_decode(
            self.operations,
            len(self.operations),
            rows.data_ptr(),
            lengths.data_ptr(),
            count,
            torch.get_num_threads(),
        )
        return self.out[:count]


class CompiledPass:
    """The layers of a stage, for some new positions of rows of a cache."""

    def __init__(
        self, config: ModelConfig, stage: LocalLayers, keys: Tensor, values: Tensor, most: int
    ) -> None:
        """keys and values are the cache's, [layers, cache rows, kv heads, max_length, D].

        most: positions that are computed at a time; a pass may have more.
        """
        self._most = most
        self._rows = keys.shape[1]
        blocks = [module for _, module in stage if isinstance(module, TransformerLayer)]
        function = _function(config)
        assert function is not None
        angles = _angles(blocks, keys)
        body = _Writer(most)
        x = body.buffer("x", config.hidden_size)
        for block, *cache in zip(blocks, keys, values, strict=True):
            body.block(block, x, (cache[0], cache[1]), angles, function)
        self._body = body.program(x, x)
        tail = _Writer(self._rows)
        x = y = tail.buffer("x", config.hidden_size)
        for layer, module in stage:
            if isinstance(module, FinalNorm):
                y = tail.norm(module.norm, y)
            elif isinstance(module, Head):
                y = tail.multiply("logits", module.final_linear, y)
            elif isinstance(module, Embedding) and layer.forward is not None:
                y = tail.multiply("logits", module.word_embeddings, y)
        self._tail = tail.program(x, y)

    def __call__(
        self, x_PH: Tensor, rows_P: Tensor, lengths_P: Tensor, wanted: slice | None = None
    ) -> Tensor:
        """What the stage makes of P positions: [P, H], or on the last stage [P, V], float32.

        Position p is the lengths_P[p]-th of the cache's row rows_P[p], and is added there, those of
        a row in order; both are int64 on the CPU. On the last stage `wanted` are the positions
        whose logits are computed, as many as the cache has rows at most.
        """
        parts = []
        for start in range(0, len(x_PH), self._most):
            part = slice(start, start + self._most)
            parts.append(self._body.run(x_PH[part], rows_P[part], lengths_P[part]).clone())
        y_PH = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(self._tail.operations) == 0:
            return y_PH
        y_PH = y_PH if wanted is None else y_PH[wanted]
        assert len(y_PH) <= self._rows, "the head's buffers are as long as the cache has rows"
        # Copied, for the next pass writes over it. The head needs no places: it does not attend.
        return self._tail.run(y_PH, rows_P, lengths_P).clone()


def _angles(blocks: Sequence[TransformerLayer], keys: Tensor) -> dict[str, Any]:
    """The fields of a rotation: one table of cosines and sines for all layers."""
    rotary = blocks[0].attention.rotary if blocks else None
    if rotary is None:
        return {}
    max_length = keys.shape[3]
    cos, sin = rotary.angles_at(torch.arange(max_length), max_length, keys)
    fields = {"cos": cos, "sin": sin, "rotary_dim": rotary.dim}
    return fields | {"interleaved": int(rotary.interleaved)}


class _Writer:
    """Writes operations down, each on buffers that have names; blocks use the same ones."""

    def __init__(self, positions: int) -> None:
        self._positions = positions
        self._operations: list[Operation] = []
        self._kept: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

    def program(self, x: Tensor, out: Tensor) -> Program:
        operations = (Operation * len(self._operations))(*self._operations)
        return Program(operations, x, out, [*self._kept, *self._buffers.values()])

    def buffer(self, name: str, width: int) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._positions, width)
        assert self._buffers[name].shape[1] == width, (name, self._buffers[name].shape, width)
        return self._buffers[name]

    def block(
        self,
        block: TransformerLayer,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        angles: dict[str, Any],
        function: str,
    ) -> None:
        """x becomes what the block makes of it."""
        normed = self.norm(block.input_layernorm, x)
        attention = self._attention(block.attention, normed, cache, angles)
        if not block.parallel_residual:
            self._sum(x, attention, x)
        if block.post_attention_layernorm is not None:
            normed = self.norm(block.post_attention_layernorm, x)
        elif not block.parallel_residual:
            normed = self.norm(block.input_layernorm, x)
        mlp = self._mlp(block.mlp, normed, function)
        if block.parallel_residual:
            mlp = self._sum(attention, mlp, mlp)
        self._sum(x, mlp, x)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        width = x.shape[1]
        out = self.buffer("normed", width)
        fields: dict[str, Any] = {"width": width, "epsilon": norm.epsilon}
        if isinstance(norm, LayerNorm):
            fields |= {"weight": norm.weight, "bias": norm.bias}
            return self._add(kernels.LAYER_NORM, x, out, **fields)
        return self._add(kernels.RMS_NORM, x, out, weight=norm.scale, **fields)

    def multiply(self, name: str, owner: nn.Module, x: Tensor, function: str = "none") -> Tensor:
        """`function` of the product with `owner`'s weight, into the buffer `name`."""
        weight, bias = weight_of(owner), bias_of(owner)
        assert isinstance(weight, Packed)
        matrix = weight.described(bias)
        self._kept += [t for t in (weight.codes, weight.scales, bias) if t is not None]
        return self._add(
            kernels.MULTIPLY,
            x,
            self.buffer(name, matrix.N),
            width=x.shape[1],
            matrix=matrix,
            function=kernels.FUNCTIONS[function],
        )

    def _add(self, kind: int, x: Tensor, out: Tensor, **fields: Any) -> Tensor:
        """One more operation, from `x` to `out`; tensors among the fields become pointers."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        self._kept += tensors.values()
        fields |= {name: value.data_ptr() for name, value in tensors.items()}
        self._operations.append(
            Operation(kind=kind, input=x.data_ptr(), output=out.data_ptr(), **fields)
        )
        return out

    def _sum(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        return self._add(kernels.ADD, x, out, second=y, width=x.shape[1])

    def _mlp(self, mlp: MLP, x: Tensor, function: str) -> Tensor:
        if not mlp.gated:
            inner = self.multiply("inner", mlp.linear1, x, function)
            return self.multiply("mlp", mlp.linear2, inner)
        both = self.multiply("up and gate", mlp.linear1, x)
        width = both.shape[1] // 2
        gated = self._add(
            kernels.GATE,
            both,
            self.buffer("inner", width),
            width=width,
            function=kernels.FUNCTIONS[function],
        )
        return self.multiply("mlp", mlp.linear2, gated)

    def _attention(
        self,
        attention: Attention,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        angles: dict[str, Any],
    ) -> Tensor:
        qkv = self.multiply("qkv", attention.query_key_value, x)
        keys, values = cache
        D, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        if kv_heads == heads:  # interleaved per head: see Attention
            strides = {"q_stride": 3 * D, "k_offset": D, "v_offset": 2 * D, "kv_stride": 3 * D}
        else:
            k_offset = heads * D
            v_offset = k_offset + kv_heads * D
            strides = {"q_stride": D, "k_offset": k_offset, "v_offset": v_offset, "kv_stride": D}
        attended = self._add(
            kernels.ATTEND,
            qkv,
            self.buffer("attended", heads * D),
            width=qkv.shape[1],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=D,
            **strides,
            window=-1 if attention.window is None else attention.window,
            **angles,
            keys=keys,
            values=values,
            max_length=keys.shape[2],
        )
        return self.multiply("attention", attention.dense, attended)
