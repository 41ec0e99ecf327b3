"""Which tensor of transformers is made of which tensor of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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


def gpt_neox_prefixes(num_layers: int) -> dict[int, tuple[str, str]]:
    """For the index of each layer what its tensors' names begin with, in transformers and here."""
    return {
        0: ("gpt_neox.embed_in.", "word_embeddings."),
        **{i + 2: (f"gpt_neox.layers.{i}.", "") for i in range(num_layers)},
        num_layers + 3: ("gpt_neox.final_layer_norm.", "norm."),
        num_layers + 4: ("embed_out.", "final_linear."),
    }


def recipes(config: ModelConfig, model_type: str, layer: Layer) -> list[Recipe]:
    """Every tensor that transformers' class for `model_type` has for a layer of ours."""
    assert layer.layout is not None
    named = _gpt_neox if model_type == "gpt_neox" else _llama
    return list(named(config, layer.index, layer.layout))


def _gpt_neox(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    theirs, ours = gpt_neox_prefixes(config.num_layers)[index]
    for source in layout:
        name = theirs + source.removeprefix(ours)
        name = name.replace(_LINEAR1, "mlp.dense_h_to_4h.")
        name = name.replace("mlp.linear2.", "mlp.dense_4h_to_h.")
        if source.startswith(_QKV) and config.kv_heads < config.num_attention_heads:
            yield _recipe(name, source, layout, partial(_one_kv_head_each, config))
        else:
            yield _recipe(name, source, layout)
        if config.shares_norm and source.startswith("input_layernorm."):
            second = name.replace("input_layernorm", "post_attention_layernorm")
            yield _recipe(second, source, layout)
    if "mlp.linear1.weight" in layout and not config.use_bias_in_mlp:
        yield Recipe(f"{theirs}mlp.dense_h_to_4h.bias", (config.ffn_size,))
        yield Recipe(f"{theirs}mlp.dense_4h_to_h.bias", (config.hidden_size,))


def _llama(config: ModelConfig, index: int, layout: LayerLayout) -> Iterator[Recipe]:
    block = f"model.layers.{index - 2}."
    names = {
        "word_embeddings.": "model.embed_tokens.",
        "norm.": "model.norm.",
        "final_linear.": "lm_head.",
        "input_layernorm.": f"{block}input_layernorm.",
        "post_attention_layernorm.": f"{block}post_attention_layernorm.",
        "attention.dense.": f"{block}self_attn.o_proj.",
        "mlp.linear2.": f"{block}mlp.down_proj.",
    }
    for source in layout:
        module, dot, kind = source.rpartition(".")
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
            yield _recipe(names[module + dot] + kind, source, layout)


def _recipe(
    name: str,
    source: str,
    layout: LayerLayout,
    make: Callable[[Tensor], Tensor] = lambda whole: whole,
) -> Recipe:
    whole = torch.empty(layout[source].shape, device="meta")
    return Recipe(name, tuple(make(whole).shape), source, make)


def _one_kv_head_each(config: ModelConfig, qkv: Tensor) -> Tensor:
    """[queries, keys, values] -> for every query head its q, k and v; k and v are repeated."""
    q, k, v = (_part_of_qkv(config, part, qkv) for part in range(3))
    share = config.num_attention_heads // config.kv_heads
    by_head = [
        heads.unflatten(0, (-1, config.head_dim)).repeat_interleave(repeats, 0)
        for heads, repeats in ((q, 1), (k, share), (v, share))
    ]
    return torch.cat(by_head, 1).flatten(0, 1)


def _part_of_qkv(config: ModelConfig, part: int, qkv: Tensor) -> Tensor:
    """The rows of all heads' queries (0), keys (1) or values (2), as the layout has them."""
    if config.kv_heads == config.num_attention_heads:
        return qkv.unflatten(0, (config.num_attention_heads, 3, -1))[:, part].flatten(0, 1)
    kv_size = config.kv_heads * config.head_dim
    return qkv.split([qkv.shape[0] - 2 * kv_size, kv_size, kv_size])[part]


def _half(half: int, fused: Tensor) -> Tensor:
    return fused.chunk(2)[half]
