"""Transformers folders for tests, made by transformers, and what it computes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import small_tokenizer

CLOSE = {"rtol": 0.0, "atol": 1e-5}
INDEX = "model.safetensors.index.json"
ROWS = 288  # of the vocabulary: what the small tokenizer's 280 tokens are padded to
TOKENS = torch.arange(24).reshape(2, 12) % ROWS

THEIRS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False, "hidden_act": "gelu_new"},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    "no_bias": {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "relu": {"hidden_act": "relu", "intermediate_size": 96},
    "gpt_j": {"model_type": "gptj"},
    "gpt_j_tied": {"model_type": "gptj", "tie_word_embeddings": True},
    "gpt_j_relu": {
        "model_type": "gptj",
        "activation_function": "relu",
        "n_inner": 96,
        "n_head": 2,
        "rotary_dim": 6,
        "layer_norm_epsilon": 0.1,
    },
}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 16,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
}


def make(folder: Path, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    """A folder as transformers writes it, of random weights and biases, with a tokenizer.

    Of GPTNeoXForCausalLM, or the class of `model_type`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shard_size, kind = values.pop("max_shard_size", "1GB"), values.pop("model_type", "gpt_neox")
    config = AutoConfig.for_model(kind, **{"vocab_size": ROWS, **_SIZES[kind], **values})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    small_tokenizer.write(folder)
    return folder


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(ids).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def replace_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
