"""A decoding pass put together once and carried out by the kernels without a return to Python.

A small model spends more time between torch's operations than in them. Here the layers of a stage
are written down as a list of operations on fixed buffers, which one call of the kernels
(neox/kernels/decode.h) works off, its threads waiting for each other between them. It is the eager
pass in other words, and tests hold it to that.
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
    """Whether the kernels have everything that the stage does: on a CPU, in float32, at tp 1."""
    if kernels.library() is None or groups.device.type != "cpu" or groups.tp > 1:
        return False
    if _function(config) is None:
        return False
    modules = [
        part for _, module in stage if isinstance(module, nn.Module) for part in module.modules()
    ]
    return all(
        parameter.dtype is torch.float32
        for module in modules
        for parameter in module.parameters(recurse=False)
    ) and all(
        isinstance(weight_of(module), Tensor | Packed) and adapter_of(module) is None
        for module in modules
        if isinstance(getattr(module, "weight", None), Tensor | nn.Module)
    )


def _function(config: ModelConfig) -> str | None:
    if config.activation in ("gelu", "geglu"):
        exact = config.activation == "geglu" or config.gelu_approximation == "none"
        return "gelu_erf" if exact else "gelu_tanh"
    return _FUNCTIONS.get(config.activation)


class CompiledPass:
    """The layers of a stage for one new position each of at most `rows` rows."""

    def __init__(
        self, config: ModelConfig, stage: LocalLayers, keys: Tensor, values: Tensor, rows: int
    ) -> None:
        """`keys` and `values` are the cache's, [layers, cache rows, kv heads, max_length, D]."""
        self.config = config
        self.rows = rows
        self._operations: list[Operation] = []
        self._kept: list[Any] = []  # what the operations point to
        self._cache = list(zip(keys, values, strict=True))
        self._input = self._output = self._buffer(config.hidden_size)
        for layer, module in stage:
            if isinstance(module, TransformerLayer):
                self._block(module)
            elif isinstance(module, FinalNorm):
                self._output = self._norm(module.norm, self._output)
            elif isinstance(module, Head):
                self._output = self._multiply(module.final_linear, self._output)
            elif isinstance(module, Embedding) and layer.forward is not None:
                self._output = self._multiply(module.word_embeddings, self._output)
        self._list = (Operation * len(self._operations))(*self._operations)

    def __call__(self, x_BH: Tensor, rows_B: Tensor, lengths_B: Tensor) -> Tensor:
        """What the stage makes of x_BH, [B, H] or on the last stage [B, V], in memory used again.

        Row b is at position lengths_B[b] of the cache's row rows_B[b], and is added there; both are
        int64 on the CPU.
        """
        count = len(x_BH)
        assert count <= self.rows and rows_B.dtype == lengths_B.dtype == torch.int64
        library = kernels.library()
        assert library is not None
        self._input[:count] = x_BH
        library.neox_decode(
            self._list,
            len(self._operations),
            rows_B.data_ptr(),
            lengths_B.data_ptr(),
            count,
            torch.get_num_threads(),
        )
        return self._output[:count]

    def _buffer(self, width: int) -> Tensor:
        buffer = torch.empty(self.rows, width)
        self._kept.append(buffer)
        return buffer

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
        x = self._output
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
        if isinstance(weight, Packed):
            matrix = weight.described(bias)
        else:
            assert isinstance(weight, Tensor) and weight.is_contiguous()
            rows, columns = weight.shape
            matrix = kernels.matrix(32, weight, None, bias, (rows, columns, columns))
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
        keys, values = self._cache[
            len([op for op in self._operations if op.kind == kernels.ATTEND])
        ]
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
            everywhere = torch.arange(max_length)
            cos, sin = attention.rotary.angles_at(everywhere, max_length, x)
            turn = {"rotary_dim": attention.rotary.dim, "cos": cos, "sin": sin}
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
