"""Genuine checkpoints are loaded by their own configuration and refused by any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import check_architecture, config_of, describe
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig, from_dict, load_config
from neox.config.architecture import architecture
from neox.errors import CheckpointError, ConfigError
from tests.conformance.conftest import SHARED
from tests.conformance.small import small_config

UPSTREAM = SHARED / "upstream"
STEPS = sorted(
    str(path.relative_to(UPSTREAM / "checkpoints"))
    for path in (UPSTREAM / "checkpoints").glob("*/global_step*")
)
BARE = "legacy_names_mp2/global_step20"  # no YAML files, no mp_rank files; rotary frequencies


def config_for(step: str, **values: Any) -> NeoXConfig:
    residual = not step.startswith("sequential_residual")
    return from_dict({**small_config(UPSTREAM), "gpt_j_residual": residual, **values})


def open_step(step: str) -> Checkpoint:
    return Checkpoint.open(UPSTREAM / "checkpoints" / step)


def test_there_are_checkpoints_of_every_kind() -> None:
    assert len(STEPS) == 6 and BARE in STEPS


@pytest.mark.parametrize("step", STEPS)
def test_a_checkpoint_fits_its_configuration_without_a_word(
    step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, other = config_for(step), config_for(step, num_kv_heads=8, intermediate_size=512)
    capsys.readouterr()
    check_architecture(config, open_step(step))
    check_architecture(other, open_step(step))
    assert capsys.readouterr() == ("", "")


CHANGES: list[tuple[str, Any, str]] = [
    ("gpt_j_residual", None, "gpt_j_residual is {}"),  # flipped
    ("gpt_j_tied", True, "gpt_j_tied is true"),
    ("num_attention_heads", 4, "num_attention_heads is 4"),
    ("rotary_pct", 0.5, "rotary_pct is 0.5"),
    ("rotary_emb_base", 500, "rotary_emb_base is 500"),
    ("num_layers", 3, "num_layers is 3, but the checkpoint's is 4"),
    ("num_layers", 5, "num_layers is 5, but the checkpoint's is 4"),
    ("hidden_size", 256, "hidden_size is 256, but the checkpoint's is 128"),
    ("no_weight_tying", False, "no_weight_tying is false, but the checkpoint's is true"),
    ("pos_emb", "learned", 'pos_emb is "learned", but the checkpoint\'s is "rotary"'),
    ("pos_emb", "none", 'pos_emb is "none", but the checkpoint\'s is "rotary"'),
    ("bias_gelu_fusion", True, "bias_gelu_fusion is true, but the checkpoint's is false"),
    ("intermediate_size", 256, "inner width 256, but the checkpoint's is 512"),
    ("num_kv_heads", 4, "num_kv_heads is 4"),
    ("norm", "rmsnorm", 'norm is "rmsnorm", but the checkpoint\'s is "layernorm"'),
]
NOT_IN_TENSORS = ("gpt_j_residual", "gpt_j_tied", "bias_gelu_fusion")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("key", "value", "said"), CHANGES)
def test_another_model_is_refused(step: str, key: str, value: Any, said: str) -> None:
    if key == "gpt_j_tied" and step.startswith("sequential"):
        key, value, said = "activation", "relu", 'activation is "relu"'
    if key == "gpt_j_residual":
        value = not config_for(step).gpt_j_residual
        said = (
            f"gpt_j_residual is {str(value).lower()}, but the checkpoint's is {not value}".lower()
        )
    attention_config = [[["global"], "all"]]
    config = config_for(step, **{key: value, "attention_config": attention_config})
    if step == BARE and key in NOT_IN_TENSORS:
        check_architecture(config, open_step(step))  # nothing in the files shows it
        return
    with pytest.raises(CheckpointError) as caught:
        check_architecture(config, open_step(step))
    message = str(caught.value)
    assert said in message and "\n" not in message, message
    if step != BARE and key not in ("num_kv_heads", "intermediate_size"):
        assert f"{step.partition('/')[2]}/configs" in message, message


def without_configs(step: str, folder: Path) -> Checkpoint:
    """The same files, but for the YAML files."""
    copy = folder / step.partition("/")[2]
    copy.mkdir()
    for path in (UPSTREAM / "checkpoints" / step).glob("*.pt"):
        (copy / path.name).symlink_to(path)
    return Checkpoint.open(copy)


def test_upstreams_arguments_tell_the_heads(tmp_path: Path) -> None:
    checkpoint = without_configs("ckpt_mp2pp1/global_step20", tmp_path)
    check_architecture(config_for("ckpt_mp2pp1"), checkpoint)
    with pytest.raises(CheckpointError, match=r"is 8 \(global_step20/mp_rank_00_model_states.pt\)"):
        check_architecture(config_for("ckpt_mp2pp1", num_attention_heads=4), checkpoint)


def test_yaml_files_beside_the_steps(tmp_path: Path) -> None:
    """The 20B weights have theirs there."""
    step = "ckpt_mp2pp1/global_step20"
    checkpoint = without_configs(step, tmp_path)
    (tmp_path / "configs").symlink_to(UPSTREAM / "checkpoints" / step / "configs")
    with pytest.raises(CheckpointError, match=rf"\({tmp_path.name}/configs/small.yml:5\)"):
        check_architecture(config_for(step, gpt_j_residual=False), checkpoint)


@pytest.mark.parametrize("step", [step for step in STEPS if step != BARE])
def test_a_checkpoint_describes_its_model(step: str) -> None:
    config = config_for(step)
    assert describe(open_step(step)) == architecture(config)
    assert config_of(open_step(step)).ffn_size == config.ffn_size


def test_what_the_bare_files_leave_open_is_named() -> None:
    with pytest.raises(
        CheckpointError,
        match="does not tell num_attention_heads, sliding_window_width, layernorm_epsilon, "
        "activation, bias_gelu_fusion and gpt_j_residual:",
    ):
        describe(open_step(BARE))


def test_upstreams_configurations_fit_checkpoints_that_hold_them(tmp_path: Path) -> None:
    """A file is read as evidence and as a configuration, and means the same."""
    tried = 0
    for path in sorted(UPSTREAM.glob("configs/**/*.yml")):
        try:
            config = load_config([path], check_files=False)
        except ConfigError:
            continue  # another test says which and why
        folder = tmp_path / str(tried)
        (folder / "configs").mkdir(parents=True)
        (folder / "configs" / path.name).symlink_to(path)
        torch.save({}, folder / "layer_00-model_00-model_states.pt")
        checkpoint = Checkpoint.open(folder)
        check_architecture(config, checkpoint)
        assert config_of(checkpoint).num_attention_heads == config.num_attention_heads
        tried += 1
    assert tried >= 37
