"""What a checkpoint says of its model, and which configurations are refused for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import check_architecture, config_of, describe, recorded
from neox.checkpoint.manifest import Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file, model_file
from neox.config import NeoXConfig, Override, load_config
from neox.config.architecture import ARCHITECTURE, architecture
from neox.errors import CheckpointError, DamageError
from neox.inference.load import load_model
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from neox.train.start import find_start
from tests.models import ARCHITECTURES, BASE, VOCAB, model_layers, random_weights
from tests.models import config_of as configuration

SINGLE = ProcessGroups.single()
EVIDENCE = ("tensors", "manifest", "args", "yaml", "beside")
STEP = "global_step5"


def write(
    directory: Path, *evidence: str, tp: int = 1, buffers: bool = False, **values: Any
) -> Checkpoint:
    """The model of BASE with `values`, in `tp` shards, and further evidence of what it is."""
    folder = directory / STEP
    folder.mkdir()
    config = configuration(**values)
    weights = random_weights(config)
    for layer in model_layers(config, SINGLE):
        if not layer.has_file:
            continue
        assert layer.layout is not None
        for rank in range(tp):
            tensors = {
                name: file_shard(
                    shard(weights[f"{layer.index}.{name}"], layout, rank, tp), layout, rank, tp
                )
                for name, layout in layer.layout.items()
            }
            torch.save(tensors, layer_file(folder, layer.index, rank))
    if "manifest" in evidence:
        Manifest(folder, 5, {"tp": tp, "pp": 1, "dp": 1}, VOCAB, architecture(config), {}).write()
    if "args" in evidence:
        keys = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
        args = {key: getattr(config, key) for key in keys} | {"tokenizer_type": "HFTokenizer"}
        torch.save({"module": None, "iteration": 5, "args": args}, model_file(folder, 0))
    if "yaml" in evidence:
        write_yaml(folder, {**BASE, **values})
    if "beside" in evidence:
        write_yaml(directory, {**BASE, **values})
    return Checkpoint.open(folder)


def write_yaml(folder: Path, values: Mapping[str, Any], name: str = "small.yml") -> Path:
    path = folder / "configs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
    return path


def add_buffers(checkpoint: Checkpoint, dtype: torch.dtype, dim: int, base: float) -> None:
    """The rotary frequencies that files of the 20B era hold in every layer."""
    frequencies = (1.0 / base ** (torch.arange(0, dim, 2) / dim)).to(dtype)
    for index in (2, 3):
        path = layer_file(checkpoint.folder, index, 0)
        tensors = torch.load(path, weights_only=True)
        torch.save({**tensors, "attention.rotary_emb.inv_freq": frequencies}, path)


def refusal(checkpoint: Checkpoint, config: NeoXConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_architecture(config, checkpoint)
    return str(caught.value)


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


@pytest.mark.parametrize("trained_with", [True, False])
def test_a_residual_that_one_side_left_out_is_the_default(
    tmp_path: Path, trained_with: bool
) -> None:
    """Upstream's gibberish: nothing in the files shows the residual."""
    checkpoint = write(tmp_path, gpt_j_residual=trained_with)
    values = {key: value for key, value in BASE.items() if key != "gpt_j_residual"}
    path = write_yaml(
        checkpoint.folder, values | {"gpt_j_residual": True} if trained_with else values
    )
    mine = write_yaml(
        tmp_path, values if trained_with else values | {"gpt_j_residual": True}, "m.yml"
    )
    said = refusal(checkpoint, load_config([mine], check_files=False))
    if trained_with:
        line = len(path.read_text().splitlines()) - 1
        assert "gpt_j_residual is false (the default), but the checkpoint's is true " in said
        assert f"(global_step5/configs/small.yml:{line})" in said
    else:
        assert (
            "but the checkpoint's is false (global_step5/configs: not set, so the default)" in said
        )


def test_hyphens_several_files_and_what_they_leave_open(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    (checkpoint.folder / "configs").mkdir()
    one = checkpoint.folder / "configs" / "a.yml"
    one.write_text("num-layers: 2\nhidden-size: 32\n")
    (checkpoint.folder / "configs" / "b.yml").write_text(
        '{"num-attention-heads": 4, "pos-emb": "Rotary", "rotary-pct": 0.5, "gpt-j-residual": True,'
        ' "no-weight-tying": True, "max-position-embeddings": 16}'
    )
    check_architecture(configuration(), checkpoint)
    said = refusal(checkpoint, configuration(rotary_pct=0.25, activation="relu"))
    assert "rotary_pct is 0.25, but the checkpoint's is 0.5 (global_step5/configs/b.yml:1)" in said
    assert 'is "gelu" (global_step5/configs: not set, so the default)' in said
    one.unlink()  # what is left does not describe a whole model
    check_architecture(configuration(activation="relu"), checkpoint)
    assert "num_attention_heads" in refusal(checkpoint, configuration(num_attention_heads=2))


def test_a_yaml_file_that_cannot_be_read_is_left_aside_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path, "yaml")
    (checkpoint.folder / "configs" / "damaged.yml").write_text("a: [1,\n")
    (checkpoint.folder / "configs" / "notes.txt").write_text("num_layers: 70\n")
    assert "gpt_j_residual" in refusal(checkpoint, configuration(gpt_j_residual=False))
    (line,) = capsys.readouterr().err.splitlines()
    assert "configs" in line and "damaged.yml:2: not valid YAML" in line
    check_architecture(configuration(activation="relu"), checkpoint)  # it may say so


@pytest.mark.parametrize("strange", ["quickgelu", 7, [], {"a": 1}])
def test_a_value_that_nobody_knows_is_not_taken_for_the_default(
    tmp_path: Path, strange: Any
) -> None:
    checkpoint = write(tmp_path)
    write_yaml(checkpoint.folder, {**BASE, "activation": strange, "attention_config": 5})
    check_architecture(configuration(activation="mish"), checkpoint)
    assert "gpt_j_residual" in refusal(checkpoint, configuration(gpt_j_residual=False))
    with pytest.raises(CheckpointError, match="does not tell activation:"):
        describe(checkpoint)


def test_what_this_project_does_not_compute_is_known_for_what_it_is(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    write_yaml(checkpoint.folder, {**BASE, "pos_emb": "alibi", "norm": "te_layernorm"})
    said = refusal(checkpoint, configuration())
    assert 'is "rotary", but the checkpoint\'s is "alibi" (global_step5/configs' in said
    path = layer_file(checkpoint.folder, 2, 0)
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "attention.alibi_embed.slopes": torch.ones(4)}, path)
    (checkpoint.folder / "configs" / "small.yml").unlink()
    said = refusal(checkpoint, configuration())
    assert 'checkpoint\'s is "alibi" (attention.alibi_embed.slopes in global_step5/layer_02' in said


def test_heads_that_do_not_divide_the_stored_width_are_not_told_by_what_follows(
    tmp_path: Path,
) -> None:
    checkpoint = write(tmp_path)
    add_buffers(checkpoint, torch.float32, 4, 10000)
    said = refusal(checkpoint, configuration(hidden_size=48, num_attention_heads=3))
    assert "hidden_size is 48" in said and "\n" not in said


def test_a_value_of_null_is_the_default(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    write_yaml(checkpoint.folder, {**BASE, "activation": None})
    assert "activation" in refusal(checkpoint, configuration(activation="mish"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"hidden_size": 64, "num_attention_heads": 16}, "hidden_size"),
        ({"norm": "rmsnorm", "num_attention_heads": 16}, "norm"),
        ({"pos_emb": "learned"}, "pos_emb"),
    ],
)
def test_yaml_files_of_another_model_are_left_aside_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], key: str
) -> None:
    checkpoint = write(tmp_path)
    write_yaml(tmp_path, {**BASE, **values})
    check_architecture(configuration(), checkpoint)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"of another model, by {key} (" in said and "configs/small.yml:" in said


def test_a_folder_of_many_configurations_is_left_aside_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path, "beside")
    write_yaml(tmp_path, {**BASE, "gpt_j_residual": False}, "other.yml")
    check_architecture(configuration(gpt_j_residual=False), checkpoint)
    (said,) = capsys.readouterr().err.splitlines()
    assert "gpt_j_residual" in said and "small.yml" in said and "other.yml" in said


def test_yaml_files_of_the_step_come_before_those_beside_it(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "yaml")
    write_yaml(tmp_path, {**BASE, "num_attention_heads": 16})
    check_architecture(configuration(), checkpoint)


def test_yaml_files_of_a_deeper_model_still_tell_the_rest(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    write_yaml(checkpoint.folder, {**BASE, "num_layers": 12})
    check_architecture(configuration(), checkpoint)
    assert "gpt_j_residual" in refusal(checkpoint, configuration(gpt_j_residual=False))
    assert "is 2 (final_linear.weight in global_step5/layer_06" in refusal(
        checkpoint, configuration(num_layers=3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pct", "base"), [(0.5, 10000), (1.0, 10000), (1.0, 500000), (1.0, 500)])
def test_rotary_frequencies_tell_dimensions_and_base(
    tmp_path: Path, dtype: torch.dtype, pct: float, base: int
) -> None:
    values = {"hidden_size": 256, "rotary_pct": pct, "rotary_emb_base": base}
    checkpoint = write(tmp_path, **values)
    add_buffers(checkpoint, dtype, int(64 * pct), base)
    check_architecture(configuration(**values), checkpoint)
    said = refusal(checkpoint, configuration(**values | {"rotary_emb_base": base * 2}))
    assert f"rotary_emb_base is {base * 2}, but the checkpoint's is" in said
    assert "attention.rotary_emb.inv_freq in global_step5/layer_02-model_00-model_states.pt" in said
    assert recorded(checkpoint)["rotary_emb_base"].value == pytest.approx(base, rel=0.02)
    said = refusal(checkpoint, configuration(**values | {"rotary_pct": 0.25}))
    assert f"rotates 16 dimensions of a head, but the checkpoint's rotate {int(64 * pct)}" in said
    said = refusal(checkpoint, configuration(**values | {"num_attention_heads": 8}))
    assert f"rotary_pct is {pct} and num_attention_heads is 8, which rotates" in said
    assert "pos_emb" in refusal(checkpoint, configuration(**values | {"pos_emb": "none"}))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.tensor([1.0, 1e-37] + [0.0] * 62),
        torch.tensor([0.25, 0.0025]),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1, 2]),
        torch.ones(2, 2),
    ],
)
def test_strange_frequencies_say_nothing_of_the_base(tmp_path: Path, buffer: torch.Tensor) -> None:
    checkpoint = write(tmp_path)
    path = layer_file(checkpoint.folder, 2, 0)
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, "attention.rotary_emb.inv_freq": buffer}, path)
    assert recorded(checkpoint)["pos_emb"].value == "rotary"
    assert "rotary_emb_base" not in recorded(checkpoint)


def test_one_frequency_is_the_same_for_every_base(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, rotary_pct=0.25)
    add_buffers(checkpoint, torch.float32, 2, 10000)
    check_architecture(configuration(rotary_pct=0.25, rotary_emb_base=7), checkpoint)


@pytest.mark.parametrize("contents", [b"", b"\x80garbage", "pickle", [1], {"args": 7}, {}])
def test_an_mp_rank_file_of_an_unknown_kind_says_nothing(tmp_path: Path, contents: Any) -> None:
    checkpoint = write(tmp_path)
    path = model_file(checkpoint.folder, 0)
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(Path("x") if contents == "pickle" else contents, path)
    check_architecture(configuration(num_attention_heads=8), checkpoint)


@pytest.mark.parametrize(
    "args",
    [
        {"num_attention_heads": "4", "hidden_size": True, "num_layers": -1},
        {"num_attention_heads": 0, "hidden_size": 1 << 70},
        {4: 5, "hidden_size": None},
    ],
)
def test_arguments_that_fit_no_key_say_nothing(tmp_path: Path, args: dict[Any, Any]) -> None:
    checkpoint = write(tmp_path)
    torch.save({"args": args}, model_file(checkpoint.folder, 0))
    check_architecture(configuration(), checkpoint)


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


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("evidence", ["manifest", "yaml", "beside"])
def test_a_checkpoint_describes_its_model(tmp_path: Path, name: str, evidence: str) -> None:
    config = configuration(**ARCHITECTURES[name])
    checkpoint = write(tmp_path, evidence, **ARCHITECTURES[name])
    assert describe(checkpoint) == architecture(config)
    assert architecture(config_of(checkpoint)) == architecture(config)


def test_a_description_has_the_depth_head_and_width_of_the_files(tmp_path: Path) -> None:
    values = {"num_layers": 3, "no_weight_tying": False, "activation": "swiglu"}
    checkpoint = write(tmp_path, intermediate_size=96, **values)
    write_yaml(
        checkpoint.folder,
        {**BASE, "activation": "swiglu", "expansion_factor": 2, "mlp_multiple_of": 5},
    )
    model = config_of(checkpoint)
    assert (model.num_layers, model.no_weight_tying, model.ffn_size) == (3, False, 32)


@pytest.mark.parametrize(
    ("evidence", "buffers", "said"),
    [
        ("tensors", False, "num_attention_heads, sliding_window_width, pos_emb, "),
        ("tensors", True, "num_attention_heads, sliding_window_width, layernorm_epsilon, "),
        ("args", True, "does not tell sliding_window_width, layernorm_epsilon, activation, "),
    ],
)
def test_what_tensors_leave_open_is_named(
    tmp_path: Path, evidence: str, buffers: bool, said: str
) -> None:
    checkpoint = write(tmp_path, evidence)
    if buffers:
        add_buffers(checkpoint, torch.float32, 4, 10000)
    with pytest.raises(CheckpointError, match=f"{said}.*gpt_j_residual.*Give --config"):
        describe(checkpoint)


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


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "model"
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
        rotary_pct=0.5,
        hidden_act="gelu_new",
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_transformers_folder_tells_every_key(transformers_folder: Path) -> None:
    checkpoint = Checkpoint.open(transformers_folder)
    config = configuration(bias_gelu_fusion=True)
    check_architecture(config, checkpoint)
    assert config_of(checkpoint).ffn_size == 128
    assert describe(checkpoint) == architecture(config) | {"intermediate_size": 128}
    said = refusal(checkpoint, configuration(gpt_j_residual=False))
    assert 'is true (model/config.json, hidden_act is "gelu_new")' in said
    assert "gpt_j_residual is false, but the checkpoint's is true (model/config.json, " in said
    for values in ({"num_attention_heads": 8}, {"num_layers": 3}, {"sliding_window_width": 4}):
        (key,) = values
        assert key in refusal(checkpoint, configuration(bias_gelu_fusion=True, **values))
