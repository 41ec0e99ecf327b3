"""Folders as mesh-transformer-jax writes them, made of a GPT-J of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 288  # of the vocabulary
HEADS, ROTARY_DIM = 4, 6
KEYS = {"num_attention_heads": HEADS, "rotary_pct": ROTARY_DIM / 8, "max_position_embeddings": 16}

_NAMES = {
    "linear": "attn.q_proj",
    "linear_1": "attn.v_proj",
    "linear_2": "attn.k_proj",
    "linear_3": "attn.out_proj",
    "linear_4": "mlp.fc_in",
    "linear_5": "mlp.fc_out",
    "replicated_layer_norm": "ln_1",
}
_BY_ROWS = ("linear_3/w", "linear_5/w")  # of JAX's [in, out]


def gpt_j(layers: int = 2, **values: Any) -> Any:
    """A model whose weights are multiples of 1/64 of at most 1: sums of a few are exact in bf16."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        **{
            "vocab_size": ROWS,
            "n_embd": 32,
            "n_layer": layers,
            "n_head": HEADS,
            "rotary_dim": ROTARY_DIM,
            "n_positions": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **values,
        }
    )
    model = GPTJForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(grid(parameter.shape, 16, generator))
    return model


def grid(shape: Sequence[int], most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-most, most + 1, tuple(shape), generator=generator) / 64


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    shards: int = 4,
    pieces: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    slim: bool = True,
    step: int = 383500,
) -> Path:
    """`weights` are those of GPTJForCausalLM; biases behind a sum are divided at random."""
    trees = _parameters(weights, shards)
    for number, parameters in enumerate(trees):
        params = [_array(parameters[name], dtype) for name in sorted(parameters)]
        leaves = [*params, np.array(step)]
        if not slim:  # Adam's count, mu, nu, and the schedule's count
            count = np.array(step, np.int32)
            moments = [np.full_like(array, 1) for array in params]
            leaves = [count, *moments, *moments, count, *leaves]
        place = folder / f"shard_{number}"
        place.mkdir(parents=True)
        size, more = divmod(len(leaves), pieces)
        for piece in range(pieces):
            start = piece * size + min(piece, more)
            stop = start + size + (piece < more)
            np.savez(place / f"{piece}.npz", *leaves[start:stop])
    return folder


def _parameters(weights: Mapping[str, Tensor], shards: int) -> list[dict[str, Tensor]]:
    """Each shard's parameters by haiku's names."""
    generator = torch.Generator().manual_seed(2)
    trees: list[dict[str, Tensor]] = [{} for _ in range(shards)]

    def put(name: str, parts: Sequence[Tensor]) -> None:
        for tree, part in zip(trees, parts, strict=True):
            tree[f"causal_transformer_shard/~/{name}"] = part

    def summands(whole: Tensor) -> list[Tensor]:
        parts = [grid(whole.shape, 4, generator) for _ in range(shards - 1)]
        return [*parts, whole - sum(parts)]

    table = weights["transformer.wte.weight"]
    biases = [grid(table.shape[1:], 4, generator) for _ in range(shards)]
    put("embedding_shard/~/linear/b", biases)
    put("embedding_shard/~/linear/w", (table - sum(biases)).chunk(shards, 0))
    depth = 1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)
    for index in range(depth):
        for ours, theirs in _NAMES.items():
            stem, there = f"layer_{index}/~/{ours}", f"transformer.h.{index}.{theirs}"
            if ours == "replicated_layer_norm":
                _norm(put, stem, there, weights, shards)
                continue
            dim = 0 if f"{ours}/w" in _BY_ROWS else 1
            put(f"{stem}/w", weights[f"{there}.weight"].T.chunk(shards, dim))
            if ours == "linear_4":
                put(f"{stem}/b", weights[f"{there}.bias"].chunk(shards))
            elif ours == "linear_5":
                put(f"{stem}/b", summands(weights[f"{there}.bias"]))
    put("projection_shard/~/linear/w", weights["lm_head.weight"].T.chunk(shards, 1))
    put("projection_shard/~/linear/b", weights["lm_head.bias"].chunk(shards))
    _norm(put, "projection_shard/~/replicated_layer_norm", "transformer.ln_f", weights, shards)
    return trees


def _norm(put: Any, stem: str, there: str, weights: Mapping[str, Tensor], shards: int) -> None:
    """Only shard 0's is ever used."""
    for ours, theirs in (("scale", "weight"), ("offset", "bias")):
        whole = weights[f"{there}.{theirs}"]
        put(f"{stem}/{ours}", [whole, *[whole + 1] * (shards - 1)])


def _array(tensor: Tensor, dtype: torch.dtype) -> Any:
    stored = tensor.detach().to(dtype).contiguous()
    assert torch.equal(stored.float(), tensor.float())
    if dtype is torch.bfloat16:
        return stored.view(torch.int16).numpy().view("V2")
    return stored.numpy()
