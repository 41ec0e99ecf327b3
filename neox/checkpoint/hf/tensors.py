"""Which tensor of transformers is made of which tensor of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neox.checkpoint.hf.names import NAMINGS, interleave
from neox.config import ModelConfig
from neox.model.gpt import Layer
from neox.model.layout import LayerLayout

_QKV, _LINEAR1 = "attention.query_key_value.", "mlp.linear1."


@dataclass(frozen=True)
class Recipe:
    """How one tensor of a folder is made: of our whole tensor `source`; zeros where it is None."""

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    make: Callable[[Tensor], Tensor] = lambda whole: whole


def recipes(config: ModelConfig, model_type: str, layer: Layer) -> list[Recipe]:
    """Every tensor that transformers' class for `model_type` has for a layer of ours."""
    assert layer.layout is not None
    named = {
        "gpt_neox": _gpt_neox,
        "gptj": _gptj,
        "gpt2": _gpt2,
        "llama": _llama,
        "mistral": _llama,
    }[model_type]
    return list(named(config, layer.index, layer.layout))


def _gpt_neox(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    for source in layout:
        (name,) = NAMINGS["gpt_neox"].of(config.num_layers, index, source)
        if source.startswith(_QKV) and config.kv_heads < config.num_attention_heads:
            yield _recipe(name, source, layout, partial(_interleaved_qkv, config))
        else:
            yield _recipe(name, source, layout)
        if config.shares_norm and source.startswith("input_layernorm."):
            second = name.replace("input_layernorm", "post_attention_layernorm")
            yield _recipe(second, source, layout)
    yield from _mlp_biases("gpt_neox", config, index, layout)


def _gptj(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    for source in layout:
        names = NAMINGS["gptj"].of(config.num_layers, index, source)
        for part, name in enumerate(names):
            if len(names) > 1:
                yield _recipe(name, source, layout, partial(_by_query_head, config, part))
            else:
                yield _recipe(name, source, layout)
    yield from _mlp_biases("gptj", config, index, layout)
    table = "final_linear.weight" if config.no_weight_tying else "word_embeddings.weight"
    if table in layout and not config.no_weight_tying:
        yield _recipe("lm_head.weight", table, layout)
    if table in layout and "final_linear.bias" not in layout:
        yield Recipe("lm_head.bias", layout[table].shape[:1])


def _mlp_biases(
    kind: str, config: ModelConfig, index: int, layout: LayerLayout
) -> Iterator[Recipe]:
    """Zeros for those that the class has and we have not."""
    if "mlp.linear1.weight" in layout and not config.use_bias_in_mlp:
        for module, rows in (("linear1", config.ffn_size), ("linear2", config.hidden_size)):
            (name,) = NAMINGS[kind].of(config.num_layers, index, f"mlp.{module}.bias")
            yield Recipe(name, (rows,))


def _gpt2(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    """Its Conv1D holds a weight as [in, out], and queries, keys and values one after another."""
    block = f"transformer.h.{index - 2}."
    names = {
        "word_embeddings": "transformer.wte",
        "position_embeddings": "transformer.wpe",
        "norm": "transformer.ln_f",
        "final_linear": "lm_head",
        "input_layernorm": f"{block}ln_1",
        "post_attention_layernorm": f"{block}ln_2",
        "attention.query_key_value": f"{block}attn.c_attn",
        "attention.dense": f"{block}attn.c_proj",
        "mlp.linear1": f"{block}mlp.c_fc",
        "mlp.linear2": f"{block}mlp.c_proj",
    }
    for source in layout:
        module, _, kind = source.rpartition(".")
        name = f"{names[module]}.{kind}"
        if source.startswith(_QKV):
            yield _recipe(name, source, layout, partial(_stacked_qkv, config))
        elif source.startswith(("attention.", "mlp.")):
            yield _recipe(name, source, layout, _transposed)
        else:
            yield _recipe(name, source, layout)
        if f"{module}.bias" not in layout and source.startswith(("attention.", "mlp.")):
            rows = layout[source].shape[0]
            if source.startswith(_QKV):
                rows = 3 * config.hidden_size
            yield Recipe(f"{names[module]}.bias", (rows,))


def _llama(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    block = f"model.layers.{index - 2}."
    names = {
        "word_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "final_linear": "lm_head",
        "input_layernorm": f"{block}input_layernorm",
        "post_attention_layernorm": f"{block}post_attention_layernorm",
        "attention.dense": f"{block}self_attn.o_proj",
        "mlp.linear2": f"{block}mlp.down_proj",
    }
    for source in layout:
        module, _, kind = source.rpartition(".")
        kind = kind.replace("scale", "weight")
        if source.startswith(_QKV):
            for part, letter in enumerate("qkv"):
                name = f"{block}self_attn.{letter}_proj.{kind}"
                yield _recipe(name, source, layout, partial(_part_of_qkv, config, part))
        elif source.startswith(_LINEAR1):
            for half, word in enumerate(("up", "gate")):
                name = f"{block}mlp.{word}_proj.{kind}"
                yield _recipe(name, source, layout, partial(_half, half))
        else:
            yield _recipe(f"{names[module]}.{kind}", source, layout)


def _recipe(
    name: str,
    source: str,
    layout: LayerLayout,
    make: Callable[[Tensor], Tensor] = lambda whole: whole,
) -> Recipe:
    whole = torch.empty(layout[source].shape, device="meta")
    return Recipe(name, tuple(make(whole).shape), source, make)


def _qkv_by_head(config: ModelConfig, qkv: Tensor) -> list[Tensor]:
    """Queries, keys and values as [heads, head, ...]; those of grouped queries are repeated."""
    share = config.num_attention_heads // config.kv_heads
    return [
        _part_of_qkv(config, part, qkv)
        .unflatten(0, (-1, config.head_dim))
        .repeat_interleave(repeats, 0)
        for part, repeats in ((0, 1), (1, share), (2, share))
    ]


def _interleaved_qkv(config: ModelConfig, qkv: Tensor) -> Tensor:
    """For every query head its query, key and value."""
    parts = [part.flatten(0, 1) for part in _qkv_by_head(config, qkv)]
    return interleave(config.num_attention_heads, parts)


def _by_query_head(config: ModelConfig, part: int, qkv: Tensor) -> Tensor:
    """The queries (0), keys (1) or values (2) of all query heads."""
    return _qkv_by_head(config, qkv)[part].flatten(0, 1)


def _stacked_qkv(config: ModelConfig, qkv: Tensor) -> Tensor:
    """[in, out] of all queries, all keys, all values."""
    return _transposed(torch.cat(_qkv_by_head(config, qkv)).flatten(0, 1))


def _transposed(tensor: Tensor) -> Tensor:
    """A weight as [in, out]; a bias as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def _part_of_qkv(config: ModelConfig, part: int, qkv: Tensor) -> Tensor:
    """The rows of all heads' queries (0), keys (1) or values (2), as the layout has them."""
    if config.kv_heads == config.num_attention_heads:
        return qkv.unflatten(0, (config.num_attention_heads, 3, -1))[:, part].flatten(0, 1)
    kv_size = config.kv_heads * config.head_dim
    return qkv.split([qkv.shape[0] - 2 * kv_size, kv_size, kv_size])[part]


def _half(half: int, fused: Tensor) -> Tensor:
    return fused.chunk(2)[half]
