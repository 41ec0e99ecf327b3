"""The keys that name texts to fine-tune on: what goes with them, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox.config import NeoXConfig, Override, from_dict, load_config
from neox.errors import ConfigError
from tests.config.runs import make_files, write
from tests.data.datasets import training_config


def settings(**values: Any) -> NeoXConfig:
    return training_config(Path(), data_path=None, split=None, **values)


def test_an_example_is_a_sample_of_its_own_unless_said() -> None:
    assert settings(finetune_data="a.txt").pack_impl == "unpacked"
    assert settings(finetune_data=["a", "b"]).finetune_data == ["a", "b"]
    assert settings(finetune_data="a.txt", pack_impl="packed").pack_impl == "packed"
    assert settings().pack_impl == "packed"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"finetune_data": "a.txt", "data_path": "b"},
            r'finetune_data is "a.txt", but there is data_path too\. Train on one of them: drop '
            r"finetune_data, or leave the datasets out with --set data_path=null\.",
        ),
        (
            {
                "finetune_data": ["a.txt"],
                **{f"{split}_data_paths": ["b"] for split in ("train", "valid", "test")},
            },
            "there are train_data_paths, valid_data_paths and test_data_paths too.*"
            "--set train_data_paths=null, --set valid_data_paths=null and --set test",
        ),
        (
            {"finetune_valid_data": "a.txt", "data_path": "b"},
            'finetune_valid_data is "a.txt", but there is no finetune_data',
        ),
        ({"finetune_data": 3}, "but it must be text or a list of texts"),
        ({"finetune_data": "a", "finetune_text_per": "page"}, "must be one of line or file"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training_config(Path(), **{"data_path": None, "split": None} | values)


def test_keys_that_nothing_reads(capsys) -> None:
    training_config(Path(), finetune_text_per="file")
    assert "finetune_text_per is" in capsys.readouterr().err
    settings(finetune_data="a.txt", finetune_text_per="file", chat_template_path="x")
    assert capsys.readouterr().err == ""
    training_config(Path(), data_path=None, finetune_data="a.txt")
    assert 'split is "8,1,1", which does nothing' in capsys.readouterr().err


def test_training_needs_either() -> None:
    values = {
        "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8,
        "max_position_embeddings": 8, "tokenizer_type": "CharLevelTokenizer", "train_iters": 1,
        "train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
    }  # fmt: skip
    assert from_dict({**values, "finetune_data": "a"}, purpose="train").data_path is None
    with pytest.raises(ConfigError, match=r"^data_path is missing.* with finetune_data"):
        from_dict({**values, "finetune_data": []}, purpose="train")


def test_files_are_looked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    write(tmp_path / "a.yml", "finetune_data: [texts.txt, more/*.txt]", without=("data_path",))

    def load(**overrides: Any) -> NeoXConfig:
        told = {key: Override(value, "--set") for key, value in overrides.items()}
        return load_config([Path("a.yml")], told, purpose="train", world_size=1)

    (tmp_path / "text.txt").touch()
    with pytest.raises(ConfigError) as caught:
        load()
    message = str(caught.value)
    assert 'a.yml:1: finetune_data names "texts.txt", but there is no such file' in message
    assert 'Did you mean "text.txt"?' in message
    assert 'finetune_data names "more/*.txt", but no file\'s name is like that' in message
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").touch()
    assert load(finetune_data=["text.txt", "more/*.txt", "more"]).pack_impl == "unpacked"
    with pytest.raises(ConfigError, match=r"chat_template_path is .* no such folder"):
        load(finetune_data="text.txt", chat_template_path="nowhere")
