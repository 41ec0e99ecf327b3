"""Adapters of PEFT's that this model would not compute as PEFT does are refused, not ignored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.files import save_file
from neox.checkpoint.hf.files import load_tensors
from neox.checkpoint.peft import read_adapters, write_adapters
from neox.errors import CheckpointError
from tests.checkpoint import peft_folders
from tests.checkpoint.peft_folders import random_adapters
from tests.models import ARCHITECTURES, VOCAB, config_of

# What is changed: keys of adapter_config.json, or tensors (by the ends of their names; None takes
# one away), and what is then said.
BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "peft_type is .?IA3.?, which is not supported. Only LORA is"),
    "dora": ({"use_dora": True}, "use_dora is true"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is .*changes the base"),
    "unknown": ({"use_novelty": {"x": 1}}, "use_novelty is .*not supported. Only plain LoRA is"),
    "bias_of_lora": ({"lora_bias": True}, "lora_bias is true"),
    "rank": ({"r": 7}, r"dense.lora_A.weight has rank 2, but by adapter_config.json it is 7 "),
    "rank_pattern": ({"rank_pattern": {"dense": 9}}, "dense.lora_A.weight has rank 2, but .* is 9"),
    "no_rank": ({"r": 0}, "r is 0, but it must be an integer of 1 or more"),
    "no_alpha": ({"lora_alpha": None}, "lora_alpha is null, but it must be a number"),
    "alphas": ({"alpha_pattern": {"dense": "x"}}, "alpha_pattern is .*must be numbers"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has .* no regular expression"),
    "bias": ({"bias": "some"}, "bias is .?some.?, but it must be none, all or lora_only"),
    "dropout": ({"lora_dropout": 2}, "lora_dropout is 2, but it must be from 0 to 1"),
    "targets": ({"target_modules": 3}, "target_modules is 3, but it must be a list of names"),
    "saved": ({"modules_to_save": "norm"}, "modules_to_save is .*must be a list of names"),
    "layers": ({"layers_to_transform": ["1"]}, "layers_to_transform is .*a list of integers"),
    "lacking": (
        {"target_modules": ["dense", "dense_h_to_4h"]},
        r"target_modules .* has gpt_neox.layers.0.mlp.dense_h_to_4h, but there is no",
    ),
    "expression": ({"target_modules": ".*embed_out"}, "has embed_out, but there is no"),
    "untrained": ({"bias": "none"}, r"query_key_value.bias is there, but .*bias is none"),
    "unsaved": ({"modules_to_save": None}, r"norm.weight is there, but .*modules_to_save \[\]"),
    "whole": (
        {"modules_to_save": ["norm", "dense_4h_to_h"]},
        r"dense_4h_to_h.bias was trained whole \(modules_to_save\), as only norms can be",
    ),
}
LAYER = "base_model.model.gpt_neox.layers.0."
BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "half": ({"dense.lora_B.weight": None}, "dense.lora_A.weight is there without its lora_B"),
    "other_half": ({"dense.lora_A.weight": None}, "dense.lora_B.weight is there without its"),
    "one": (
        {"layers.1.attention.dense.lora_A.weight": None, "1.attention.dense.lora_B.weight": None},
        "is incomplete: target_modules .* has gpt_neox.layers.1.attention.dense",
    ),
    "none": ({".lora_A.weight": None, ".lora_B.weight": None}, "holds no adapters"),
    "width": (
        {"attention.dense.lora_A.weight": torch.ones(2, 16)},
        r"dense.lora_A.weight is \[2, 16\], and \[2, 32\] fits the model",
    ),
    "height": (
        {"attention.dense.lora_B.weight": torch.ones(64, 2)},
        r"dense.lora_B.weight is \[64, 2\], and \[32, 2\] fits",
    ),
    "bias_size": ({"mlp.dense_4h_to_h.bias": torch.ones(31)}, r"bias is \[31\], and \[32\] fits"),
    "scalar": ({"mlp.dense_4h_to_h.bias": torch.ones(())}, r"bias is \[\], and \[32\] fits"),
    "whole_numbers": (
        {"attention.dense.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)},
        "holds torch.int8 numbers",
    ),
    "depth": (
        {f"{LAYER.replace('0', '7')}mlp.dense_4h_to_h.lora_A.weight": torch.ones(2, 32)},
        r"layer 7, but the model has layers 0 to 1 \(num_layers\)",
    ),
    "llama": (
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        "q_proj.lora_A.weight has no place in this model, whose names are like gpt_neox.layers",
    ),
    "gpt_j": (
        {"base_model.model.transformer.h.0.mlp.fc_in.lora_A.weight": torch.ones(2, 32)},
        "fc_in.lora_A.weight has no place in this model",
    ),
    "embedding": (
        {"base_model.model.gpt_neox.embed_in.lora_embedding_A": torch.ones(2, 64)},
        "lora_embedding_A is an adapter of an embedding, which is not supported",
    ),
    "embedding_as_matrix": (
        {"base_model.model.gpt_neox.embed_in.lora_A.weight": torch.ones(2, 64)},
        "embed_in.lora_A.weight has no place",
    ),
    "magnitude": (
        {f"{LAYER}attention.dense.lora_magnitude_vector": torch.ones(32)},
        "is of DoRA, which is not supported",
    ),
    "bias_of_b": (
        {f"{LAYER}attention.dense.lora_B.bias": torch.ones(32)},
        "is a bias of an adapter",
    ),
    "head": (
        {"base_model.model.classifier.weight": torch.ones(2, 32)},
        "classifier.weight has no place",
    ),
    "weight": (
        {f"{LAYER}mlp.dense_4h_to_h.weight": torch.ones(32, 128)},
        "dense_4h_to_h.weight is there, but .* it was not trained",
    ),
    "prefix": (
        {"model.final_layer_norm.bias": torch.ones(32)},
        "does not begin with base_model",
    ),
    "again": (
        {f"{LAYER}input_layernorm.modules_to_save.bias": torch.ones(32)},
        "modules_to_save.bias is not the same as base_model.model.gpt_neox.layers.0.input",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters of `dense`, with norms and biases."""
    adapters = random_adapters(config_of(), ("attention.dense",), biases=True, norms=True)
    write_adapters(tmp_path, config_of(), adapters, None)
    return tmp_path


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_mean_another_model_are_refused(name: str, folder: Path) -> None:
    changes, message = BAD_SETTINGS[name]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapters(folder, config_of(), VOCAB)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_without_a_place_are_refused(name: str, folder: Path) -> None:
    changes, message = BAD_TENSORS[name]
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, torch.Tensor | None] = dict(load_tensors(path))
    for end, tensor in changes.items():
        names = [name for name in tensors if name.endswith(end)] or [end]
        tensors |= dict.fromkeys(names, tensor)
    path.unlink()
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapters(folder, config_of(), VOCAB)
    assert str(folder / "adapter_model.bin") in str(caught.value)


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo executed >&2",)


def test_files_that_are_none_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged"):
        read_adapters(folder, config_of(), VOCAB)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        read_adapters(folder, config_of(), VOCAB)
    torch.save({"base_model.model.x": Trap()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        read_adapters(folder, config_of(), VOCAB)
    assert "executed" not in capfd.readouterr().err
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not JSON"):
        read_adapters(folder, config_of(), VOCAB)


def test_what_is_one_tensor_here_and_two_there_has_to_agree(tmp_path: Path) -> None:
    for name, settings, message in (
        ("one_norm", {"modules_to_save": ["input_layernorm"]}, "has no .*post_attention_layernorm"),
        ("one_norm", {"modules_to_save": ["layernorm"]}, "differs from .* one tensor here"),
        ("grouped_queries", {"target_modules": ["query_key_value"]}, "differs among heads that"),
    ):
        place = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        peft_folders.base(place, **ARCHITECTURES[name])
        made = peft_folders.make(place, **{"target_modules": ["dense"], **settings})
        with pytest.raises(CheckpointError, match=message):
            read_adapters(made, config_of(**ARCHITECTURES[name]), VOCAB)


def test_a_tied_output_projection_has_no_adapter(tmp_path: Path) -> None:
    write_adapters(tmp_path, config_of(), random_adapters(config_of(), head=True), None)
    with pytest.raises(CheckpointError, match=r"which is the embedding here \(no_weight_tying\)"):
        read_adapters(tmp_path, config_of(no_weight_tying=False), VOCAB)
