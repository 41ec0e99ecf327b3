"""What the names and shapes of a checkpoint's tensors tell about its architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import Shard

# What only one way of positions has, as a tensor or a buffer.
_POSITIONS = {
    "position_embeddings.weight": "learned",
    "position_embeddings.inv_freq": "sinusoidal",
    "attention.rotary_emb.inv_freq": "rotary",
    "attention.alibi_embed.slopes": "alibi",
    "attention.rpe.weight": "rpe",
}
_LARGEST = math.log(1 << 63)  # of a base
_NORMS = {"weight": "layernorm", "scale": "rmsnorm", "g": "scalenorm"}


@dataclass(frozen=True)
class Fact:
    """A value, and where it stands: "global_step5/configs/20B.yml:12".

    `tolerance` is relative. `files` are those whose tensors show it, which may be damaged.
    """

    value: Any
    where: str
    tolerance: float = 0.0
    files: tuple[Path, ...] = ()


Facts = dict[str, Fact]  # by the names of neox.config.architecture.TRAITS


def tensor_facts(checkpoint: Checkpoint) -> Facts:
    """The traits that the first and last layers show; the values of rotary frequencies are read.

    Layers in between are compared with the configuration when they are loaded. Layers that are
    missing tell nothing. Raises CheckpointError for files that cannot be read.
    """
    present = checkpoint.indices
    first = _Layer(checkpoint, 0) if 0 in present else None
    block = _Layer(checkpoint, 2) if 2 in present else None
    last = _Layer(checkpoint, present[-1])
    facts = {name: fact for layer in (first, block) if layer for name, fact in _positions(layer)}
    if first and block and "pos_emb" not in facts:
        facts["has_learned_positions"] = first.fact(False, None, "position_embeddings.weight")
    if first and (shape := first.shape("word_embeddings.weight")):
        facts["hidden_size"] = first.fact(shape[1], "word_embeddings.weight")
    if block:
        facts |= _norm(block) | _attention(block) | _mlp(block)
    return facts | _ending(last)


class _Layer:
    """The shards of one layer, by the names of today."""

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self.index = index
        self.shards = checkpoint.shards(index)
        self.folder = checkpoint.folder.absolute().name

    @property
    def _first(self) -> Shard:
        return self.shards[0]

    @property
    def _file(self) -> str:
        return f"{self.folder}/{self._first.where.name}"

    def __contains__(self, name: str) -> bool:
        return name in self._first.tensors or name in self._first.buffers

    def buffer(self, name: str) -> Tensor | None:
        return self._first.buffers.get(name)

    def shape(self, name: str) -> tuple[int, int] | None:
        """Of a matrix's first shard; None where there is no such matrix."""
        if name not in self._first.tensors:
            return None
        found = self._first.described(name)
        return (found.shape[0], found.shape[1]) if found.ndim == 2 else None

    def total(self, name: str, dim: int) -> int:
        """The size of a dimension that is split, over all shards."""
        shards = [shard for shard in self.shards if name in shard.tensors]
        return sum(shard.described(name).shape[dim] for shard in shards)

    def fact(self, value: Any, held: str | None, lacked: str = "", tolerance: float = 0.0) -> Fact:
        """A value that a tensor shows, or the lack of one."""
        if held is None:
            where = f"{self._file} has no {self._found(lacked)}"
        else:
            where = f"{self._found(held)} in {self._file}"
        return Fact(value, where, tolerance, tuple(shard.where for shard in self.shards))

    def _found(self, name: str) -> str:
        return self._first.names.get(name, name)


def _positions(layer: _Layer) -> Iterator[tuple[str, Fact]]:
    for name, kind in _POSITIONS.items():
        if name in layer:
            yield "pos_emb", layer.fact(kind, name)
    if shape := layer.shape("position_embeddings.weight"):
        yield "max_position_embeddings", layer.fact(shape[0], "position_embeddings.weight")
    name = "attention.rotary_emb.inv_freq"
    frequencies = layer.buffer(name)
    if frequencies is not None and frequencies.ndim == 1 and frequencies.is_floating_point():
        yield "rotary_dim", layer.fact(2 * len(frequencies), name)
        yield "rotary_interleaved", layer.fact(False, name)  # upstream alone keeps them
        if (found := _rotary_base(frequencies)) is not None:
            base, tolerance = found
            yield "rotary_emb_base", layer.fact(base, name, tolerance=tolerance)


def _rotary_base(frequencies: Tensor) -> tuple[int, float] | None:
    """From base^(-2i/dim) of i = 0, 1, ...: the base, and how exactly it can be known.

    An error e of a frequency becomes an error e * dim/2i of the base, so the largest i is best, as
    far as the files' precision holds its frequency (float16 ends at 6e-5).
    """
    precision = torch.finfo(frequencies.dtype)
    values = frequencies.tolist()
    normal = [i for i, value in enumerate(values) if precision.tiny <= value < 1.0]
    if not normal or values[0] != 1.0:
        return None  # one frequency, 1, is the same for every base; others were scaled
    best, half = normal[-1], len(values)
    exponent = -half / best * math.log(values[best])
    if exponent > _LARGEST:
        return None
    base = math.exp(exponent)
    return round(base), max(4 * precision.eps * half / best, 0.5 / base)


def _norm(block: _Layer) -> Facts:
    facts = {}
    for ending, norm in _NORMS.items():
        if (name := f"input_layernorm.{ending}") in block:
            facts["norm"] = block.fact(norm, name)
            if (second := f"post_attention_layernorm.{ending}") not in block:
                facts["gpt_j_residual"] = facts["gpt_j_tied"] = block.fact(True, None, second)
    return facts


def _attention(block: _Layer) -> Facts:
    name = "attention.query_key_value.weight"
    shape = block.shape(name)
    if shape is None:
        return {}
    hidden, rows = shape[1], block.total(name, 0)
    return {
        "kv_width": block.fact((rows - hidden) // 2, name),  # as many queries as hidden_size
        "use_bias_in_attn_linear": _bias(block, "attention.query_key_value.bias"),
    }


def _mlp(block: _Layer) -> Facts:
    into, out = "mlp.linear1.weight", "mlp.linear2.weight"
    if block.shape(into) is None or block.shape(out) is None:
        return {}
    width, rows = block.total(out, 1), block.total(into, 0)
    facts = {
        "ffn_size": block.fact(width, out),
        "use_bias_in_mlp": _bias(block, "mlp.linear1.bias"),
    }
    if rows in (width, 2 * width):
        facts["is_gated"] = block.fact(rows == 2 * width, into)
    return facts


def _bias(layer: _Layer, name: str) -> Fact:
    return layer.fact(True, name) if name in layer else layer.fact(False, None, name)


def _ending(last: _Layer) -> Facts:
    """The depth, by the layer that comes last: the head L + 4, the norm L + 3, or a block L + 1."""
    head = "final_linear.weight"
    if head in last:
        return {
            "num_layers": last.fact(last.index - 4, head),
            "no_weight_tying": last.fact(True, head),
            "use_bias_in_final_linear": _bias(last, "final_linear.bias"),
        }
    norm = next((f"norm.{ending}" for ending in _NORMS if f"norm.{ending}" in last), None)
    if norm is not None:
        where = f"{last.folder} holds no layer {last.index + 1} with {head}"
        return {
            "num_layers": last.fact(last.index - 3, norm),
            "no_weight_tying": Fact(False, where),
        }
    return {}
