"""Which configurations are refused for a checkpoint, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import check_architecture, describe
from neox.checkpoint.manifest import Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file
from neox.config import Override, load_config
from neox.config.architecture import ARCHITECTURE, architecture
from neox.errors import CheckpointError, DamageError
from neox.inference.load import load_model
from neox.train.start import find_start
from tests.checkpoint.described import (
    EVIDENCE,
    SINGLE,
    STEP,
    add_buffers,
    refusal,
    write,
)
from tests.models import ARCHITECTURES, BASE, VOCAB
from tests.models import config_of as configuration


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_a_model_fits_its_own_configuration(tmp_path: Path, name: str, evidence: str) -> None:
    values = ARCHITECTURES[name]
    tp = 2 if evidence in ("tensors", "args") else 1
    check_architecture(configuration(**values), write(tmp_path, evidence, tp=tp, **values))


LEARNED = {"pos_emb": "learned"}
NO_MLP_BIAS = {"use_bias_in_mlp": False}

# A key, what both configurations share, one value, another, and whether tensors show which it is.
CONTRADICTIONS: list[tuple[str, dict[str, Any], Any, Any, bool]] = [
    ("num_layers", {}, 2, 3, True),
    ("hidden_size", {}, 32, 64, True),
    ("hidden_size", {"intermediate_size": 96}, 32, 64, True),
    ("num_attention_heads", {}, 4, 2, False),
    ("num_attention_heads", {"num_kv_heads": 2}, 4, 8, True),
    ("num_kv_heads", {}, None, 2, True),
    ("num_kv_heads", {}, 1, 2, True),
    ("sliding_window_width", {}, None, 4, False),
    ("pos_emb", {}, "rotary", "learned", True),
    ("pos_emb", {}, "rotary", "none", False),
    ("pos_emb", {}, "learned", "none", True),
    ("max_position_embeddings", LEARNED, 16, 32, True),
    ("rotary_pct", {}, 0.5, 0.25, False),
    ("rotary_emb_base", {}, 10000, 10050, False),
    ("rotary_interleaved", {}, False, True, False),
    ("norm", {}, "layernorm", "rmsnorm", True),
    ("layernorm_epsilon", {}, 1e-5, 1.1e-5, False),
    ("rms_norm_epsilon", {"norm": "rmsnorm"}, 1e-8, 1e-6, False),
    ("activation", {}, "gelu", "relu", False),
    ("activation", {"intermediate_size": 96}, "gelu", "swiglu", True),
    ("activation", {"intermediate_size": 96}, "geglu", "swiglu", False),
    ("bias_gelu_fusion", {}, False, True, False),
    ("intermediate_size", {}, None, 96, True),
    ("intermediate_size", {"activation": "swiglu"}, 96, 192, True),
    ("expansion_factor", {}, None, 3.0, True),
    ("mlp_multiple_of", {}, 1, 96, True),
    ("gpt_j_residual", {}, True, False, False),
    ("gpt_j_residual", NO_MLP_BIAS, True, False, False),
    ("gpt_j_tied", {}, False, True, False),
    ("use_bias_in_attn_linear", {}, True, False, True),
    ("use_bias_in_mlp", {}, True, False, True),
    ("no_weight_tying", {}, True, False, True),
    ("use_bias_in_final_linear", {}, False, True, True),
]


def test_every_key_is_tried() -> None:
    assert {key for key, *_ in CONTRADICTIONS} == set(ARCHITECTURE)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("evidence", ["manifest", "yaml", "beside"])
@pytest.mark.parametrize(("key", "shared", "one", "other", "by_tensors"), CONTRADICTIONS)
def test_a_key_that_contradicts_is_refused_and_named_alone(
    tmp_path: Path,
    key: str,
    shared: dict[str, Any],
    one: Any,
    other: Any,
    by_tensors: bool,
    evidence: str,
    swapped: bool,
) -> None:
    stored, asked = (other, one) if swapped else (one, other)
    checkpoint = write(tmp_path, evidence, **shared, **{key: stored})
    said = refusal(checkpoint, configuration(**shared, **{key: asked}))
    assert key in said and "\n" not in said, said


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("key", "shared", "one", "other", "by_tensors"), CONTRADICTIONS)
def test_tensors_alone_show_some_keys_and_say_nothing_of_the_others(
    tmp_path: Path,
    key: str,
    shared: dict[str, Any],
    one: Any,
    other: Any,
    by_tensors: bool,
    tp: int,
    swapped: bool,
) -> None:
    stored, asked = (other, one) if swapped else (one, other)
    config = configuration(**shared, **{key: asked})
    if (key, stored) == ("num_kv_heads", 1):
        tp = 1
    checkpoint = write(tmp_path, tp=tp, **shared, **{key: stored})
    if by_tensors or (key, stored) == ("gpt_j_tied", True):  # that has no second norm
        said = refusal(checkpoint, config)
        assert key in said or "inner width" in said, said
        assert "\n" not in said
        assert "global_step5/layer_0" in said or "(global_step5 holds no layer 6 with" in said, said
    else:
        check_architecture(config, checkpoint)


def test_the_second_norm_that_upstream_writes_and_does_not_read(tmp_path: Path) -> None:
    check_architecture(configuration(gpt_j_tied=True), write(tmp_path))


def test_arguments_of_mp_rank_files_tell_the_heads(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "args")
    said = refusal(checkpoint, configuration(num_attention_heads=8))
    assert (
        "num_attention_heads is 8, but the checkpoint's is 4 "
        "(global_step5/mp_rank_00_model_states.pt)." in said
    )


# What both configurations share, what the checkpoint says, and what means the same.
SAME: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {"intermediate_size": 128}),
    ({}, {"expansion_factor": 4.0}, {"intermediate_size": 128}),
    ({"activation": "swiglu"}, {}, {"intermediate_size": 129}),
    ({}, {"intermediate_size": 96, "mlp_multiple_of": 32}, {"intermediate_size": 96}),
    ({}, {}, {"num_kv_heads": 4}),
    ({}, {}, {"rotary_pct": 0.55}),
    ({}, {}, {"max_position_embeddings": 64, "seq_length": 8}),
    (LEARNED, {"rotary_pct": 0.25}, {"rotary_emb_base": 500}),
    ({"norm": "rmsnorm"}, {}, {"layernorm_epsilon": 1e-3}),
    ({}, {}, {"rms_norm_epsilon": 1e-3}),
    ({}, {}, {"layernorm_epsilon": 9.999999747378752e-06}),
    ({}, {"activation": "silu"}, {"activation": "swish"}),
    ({"activation": "relu"}, {}, {"bias_gelu_fusion": True}),
    ({"activation": "swiglu"}, {}, {"bias_gelu_fusion": True}),
    ({"gpt_j_residual": False}, {}, {"gpt_j_tied": True}),
    ({}, {}, {"attention_config": [[["flash"], 2]]}),
    ({}, {}, {"precision": "bfloat16", "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    ({}, {}, {"init_method": "normal", "make_vocab_size_divisible_by": 4, "seq_length": 4}),
]


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize(("shared", "one", "other"), SAME)
def test_what_means_the_same_is_not_refused(
    tmp_path: Path,
    shared: dict[str, Any],
    one: dict[str, Any],
    other: dict[str, Any],
    evidence: str,
    swapped: bool,
) -> None:
    stored, asked = (other, one) if swapped else (one, other)
    checkpoint = write(tmp_path, evidence, **shared, **stored)
    check_architecture(configuration(**shared, **asked), checkpoint)


def test_all_contradictions_are_told_together_with_their_places(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "yaml", hidden_size=64, num_attention_heads=8)
    file = tmp_path / "my.yml"
    values = {**BASE, "hidden_size": 32, "gpt_j_residual": False}
    del values["rotary_pct"]
    file.write_text("# mine\n" + json.dumps(values, indent=1))
    overrides = {"num_attention_heads": Override(16, "--set")}
    said = refusal(checkpoint, load_config([file], overrides, check_files=False)).splitlines()
    assert said[1:] == [
        "  hidden_size is 32 (my.yml:4), but the checkpoint's is 64 "
        "(global_step5/configs/small.yml:3).",
        "  num_attention_heads is 16 (--set), but the checkpoint's is 8 "
        "(global_step5/configs/small.yml:4).",
        "  rotary_pct is 1.0 (the default), but the checkpoint's is 0.5 "
        "(global_step5/configs/small.yml:8).",
        "  gpt_j_residual is false (my.yml:10), but the checkpoint's is true "
        "(global_step5/configs/small.yml:10).",
        "  Give the configuration the checkpoint's values, or correct the checkpoint's YAML file "
        "if the model was trained otherwise.",
    ]
    assert said[0].endswith("global_step5 does not fit the configuration in 4 keys:")


def test_heads_that_do_not_divide_the_stored_width_are_not_told_by_what_follows(
    tmp_path: Path,
) -> None:
    checkpoint = write(tmp_path)
    add_buffers(checkpoint, torch.float32, 4, 10000)
    said = refusal(checkpoint, configuration(hidden_size=48, num_attention_heads=3))
    assert "hidden_size is 48" in said and "\n" not in said


def test_a_manifest_from_before_a_key_means_its_default(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    written = architecture(configuration())
    for key in ("rotary_interleaved", "use_bias_in_final_linear"):
        del written[key]
    Manifest(checkpoint.folder, 5, {"tp": 1, "pp": 1, "dp": 1}, VOCAB, written, {}).write()
    checkpoint = Checkpoint.open(checkpoint.folder)
    check_architecture(configuration(), checkpoint)
    assert describe(checkpoint) == architecture(configuration())
    said = refusal(checkpoint, configuration(rotary_interleaved=True))
    assert "rotary_interleaved is true, but the checkpoint's is false" in said
    assert "manifest.json: not set, so the default" in said


FINE_TUNED = {
    "rotary_emb_base": 500000,
    "sliding_window_width": 8,
    "layernorm_epsilon": 1e-6,
    "bias_gelu_fusion": True,
}


def test_fine_tuning_may_change_what_no_tensor_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path, "yaml")
    config = configuration(**FINE_TUNED)
    check_architecture(config, checkpoint, finetune=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FINE_TUNED)
    for key in FINE_TUNED:
        assert sum(line.startswith(f"finetune: {key} is ") for line in lines) == 1
    assert "in 4 keys" in refusal(checkpoint, config)
    with pytest.raises(CheckpointError, match="gpt_j_residual is false"):
        check_architecture(configuration(gpt_j_residual=False), checkpoint, finetune=True)


def test_a_damaged_shape_is_not_taken_for_another_model(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    path = layer_file(checkpoint.folder, 0, 0)
    written = bytearray(path.read_bytes())
    at = written.index(b"K\x40K\x20")  # [64, 32] in the pickle
    written[at + 3] = 16
    path.write_bytes(written)
    with pytest.raises(DamageError, match="layer_00-model_00"):
        check_architecture(configuration(), checkpoint)


@pytest.mark.parametrize("index", [0, 2, 3, 5, 6])
def test_a_missing_layer_is_not_taken_for_another_model(tmp_path: Path, index: int) -> None:
    checkpoint = write(tmp_path, "yaml")
    layer_file(checkpoint.folder, index, 0).unlink()
    checkpoint = Checkpoint.open(checkpoint.folder)
    if index == 6:
        assert "holds no layer 6 with final_linear.weight" in refusal(checkpoint, configuration())
    else:
        check_architecture(configuration(), checkpoint)


def test_a_model_is_not_loaded_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    write(tmp_path, "yaml")
    config = configuration(load=str(tmp_path / STEP), gpt_j_residual=False)
    with pytest.raises(CheckpointError, match="gpt_j_residual is false"):
        load_model(config, SINGLE)


@pytest.mark.parametrize("finetune", [False, True])
def test_training_does_not_start_from_a_checkpoint_of_another_model(
    tmp_path: Path, finetune: bool
) -> None:
    write(tmp_path, "yaml")
    config = configuration(load=str(tmp_path / STEP), num_attention_heads=8, finetune=finetune)
    with pytest.raises(CheckpointError, match="num_attention_heads is 8"):
        find_start(config, SINGLE)
    config = configuration(load=str(tmp_path / STEP), rotary_emb_base=500, finetune=finetune)
    if finetune:
        assert find_start(config, SINGLE).checkpoint is not None
    else:
        with pytest.raises(CheckpointError, match="rotary_emb_base is 500"):
            find_start(config, SINGLE)
