"""What a checkpoint says of its model, by its files of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import check_architecture, config_of, describe, recorded
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file, model_file
from neox.config import load_config
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from tests.checkpoint.described import (
    add_buffers,
    refusal,
    write,
    write_yaml,
)
from tests.models import ARCHITECTURES, BASE, VOCAB
from tests.models import config_of as configuration


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
    said = refusal(checkpoint, configuration(**values | {"rotary_interleaved": True}))
    assert "rotary_interleaved is true, but the checkpoint's is false" in said


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
        ("tensors", True, "num_attention_heads, sliding_window_width, "),
        (
            "args",
            True,
            "does not tell sliding_window_width, ",
        ),
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
