"""An export is what transformers computes our logits from; one that is not never appears."""

from __future__ import annotations

import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.hf import export as exporting
from neox.checkpoint.hf.export import export
from neox.checkpoint.hf.importing import import_folder
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig, hf_classes
from neox.errors import CheckpointError, ConfigError
from tests.checkpoint.hf_folders import (
    CLOSE,
    INDEX,
    assert_same_tensors,
    drop_tensor,
    edit_config,
    stored,
    their_logits,
)
from tests.models import ARCHITECTURES, config_of, random_weights, tokens, write_model
from tests.reference import reference_logits

LLAMA = {**ARCHITECTURES["llama"], "rms_norm_epsilon": 1e-8}
EXPORTED: dict[str, dict[str, Any]] = {
    **{
        name: ARCHITECTURES[name]
        for name in (
            *("neox", "sequential", "one_norm", "tied", "tanh_gelu", "no_bias", "full_rotary"),
            *("sequential_no_bias", "mlp_bias_only", "grouped_queries", "relu", "mish", "gpt_j"),
        )
    },
    "gpt_j_grouped_no_bias": {
        **ARCHITECTURES["gpt_j"],
        "num_kv_heads": 2,
        "use_bias_in_mlp": False,
        "use_bias_in_final_linear": False,
        "intermediate_size": 96,
    },
    "gpt_j_tied": {**ARCHITECTURES["gpt_j"], "no_weight_tying": False},
    "llama": LLAMA,
    "llama_biases": {
        **LLAMA,
        "num_kv_heads": None,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "no_weight_tying": False,
    },
    "mistral": {**LLAMA, "sliding_window_width": 4},
    "gpt2": {"pos_emb": "learned", "gpt_j_residual": False, "no_weight_tying": False},
    "gpt2_grouped": {
        "pos_emb": "learned",
        "gpt_j_residual": False,
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "bias_gelu_fusion": True,
    },
}


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_computes_the_same_from_an_export(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(**EXPORTED[name])
    write_model(tmp_path / "neox", 1, **EXPORTED[name])
    capfd.readouterr()
    export(Checkpoint.open(tmp_path / "neox"), config, tmp_path / "hf")
    said = capfd.readouterr()
    expected = reference_logits(config, random_weights(config), tokens())
    assert_close(their_logits(tmp_path / "hf", tokens()), expected, **CLOSE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "neox"]
    assert said.err == "" and "logits of transformers differ by" in said.out.splitlines()[-1]
    assert len(said.out.splitlines()) == 1 + ("grouped" in name)


@pytest.mark.parametrize(
    "name", ["no_positions", "window", "geglu", "softsign", "learned", "grouped_interleaved"]
)
def test_a_model_of_no_class_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "neox", 1, **ARCHITECTURES[name])
    with pytest.raises(ConfigError, match="no class of transformers"):
        config = config_of(**ARCHITECTURES[name])
        export(Checkpoint.open(tmp_path / "neox"), config, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_a_large_epsilon_under_the_root_is_another_function(tmp_path: Path) -> None:
    values = ARCHITECTURES["llama"]  # its rms_norm_epsilon is 1e-5
    write_model(tmp_path / "neox", 1, **values)
    with pytest.raises(CheckpointError, match=r"rms_norm_epsilon \(1e-05\) is added to the root"):
        export(Checkpoint.open(tmp_path / "neox"), config_of(**values), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Checkpoint, NeoXConfig]:
    write_model(tmp_path / "neox", 1)
    return Checkpoint.open(tmp_path / "neox"), config_of()


def test_parts_are_no_larger_than_asked_and_hold_the_same(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    export(*checkpoint, tmp_path / "whole")
    export(*checkpoint, tmp_path / "parts", max_shard_bytes=20_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000
    tensors = stored(tmp_path / "parts")
    assert_same_tensors(tensors, stored(tmp_path / "whole"))
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert_close(
        their_logits(tmp_path / "parts", tokens()), their_logits(tmp_path / "whole", tokens())
    )


@pytest.mark.parametrize("name", ["neox", "sequential", "gpt_j"])
def test_an_export_does_not_depend_on_the_shards(name: str, tmp_path: Path) -> None:
    config = config_of(**ARCHITECTURES[name])
    write_model(tmp_path / "tp1", 1, **ARCHITECTURES[name])
    export(Checkpoint.open(tmp_path / "tp1"), config, tmp_path / "hf1")
    step = import_folder(tmp_path / "hf1", tmp_path / "tp2", tp=2)
    assert len(list(step.glob("layer_*"))) == 2 * len(list((tmp_path / "tp1").glob("*/layer_*")))
    export(Checkpoint.open(tmp_path / "tp2"), config, tmp_path / "hf2")
    one, two = ((tmp_path / hf / "model.safetensors").read_bytes() for hf in ("hf1", "hf2"))
    assert one == two


def test_another_precision(checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path) -> None:
    export(*checkpoint, tmp_path / "fp32")
    export(*checkpoint, tmp_path / "bf16", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in stored(tmp_path / "fp32").items()}
    assert_same_tensors(stored(tmp_path / "bf16"), expected)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_only_one_tensor_is_held(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    make_one = exporting._make

    def watched(*arguments: Any) -> Tensor:
        assert not any(earlier() is not None for earlier in made)
        tensor = make_one(*arguments)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(exporting, "_make", watched)
    export(*checkpoint, tmp_path / "hf")
    assert len(made) == len(stored(tmp_path / "hf"))


def perturb(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.1.attention.dense.weight"][3, 5] += 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


WRONG = {
    "a number": (perturb, "differ by"),
    "a missing tensor": (
        lambda f: drop_tensor(f, "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
        "does not load it",
    ),
    "the residual": (lambda f: edit_config(f, use_parallel_residual=False), "differ by"),
    "the activation": (lambda f: edit_config(f, hidden_act="gelu_fast"), "differ by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_export_is_given_up(
    name: str,
    checkpoint: tuple[Checkpoint, NeoXConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, said = WRONG[name]
    prove = exporting.prove

    def spoil_first(checkpoint: Any, config: Any, folder: Path, dtype: Any) -> None:
        spoil(folder)
        prove(checkpoint, config, folder, dtype)

    monkeypatch.setattr(exporting, "prove", spoil_first)
    with pytest.raises(CheckpointError, match=said):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_the_proof_notices_a_gelu_that_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_classes, "_hidden_act", lambda config: "gelu")
    values = ARCHITECTURES["tanh_gelu"]
    write_model(tmp_path / "neox", 1, **values)
    with pytest.raises(CheckpointError, match="differ by"):
        export(Checkpoint.open(tmp_path / "neox"), config_of(**values), tmp_path / "hf")


def test_a_damaged_checkpoint_is_not_exported(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    file = tmp_path / "neox" / "global_step1" / "layer_03-model_00-model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_what_is_there_is_never_overwritten(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    export(*checkpoint, tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for act in (
        lambda: export(*checkpoint, tmp_path / "hf"),
        lambda: import_folder(tmp_path / "hf", tmp_path / "hf"),
        lambda: export(*checkpoint, tmp_path / "hf" / "config.json"),
    ):
        with pytest.raises(CheckpointError, match="there already"):
            act()
    assert (tmp_path / "hf" / "config.json").read_bytes() == before


def test_a_full_disk_leaves_nothing_behind(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="hf cannot be written: No space left"):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]
