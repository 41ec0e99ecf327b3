"""Import then export is bitwise; the tokenizer goes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from neox.checkpoint.hf.export import export
from neox.checkpoint.hf.importing import import_folder
from neox.checkpoint.neox import Checkpoint
from neox.config import from_dict, load_config
from neox.errors import CheckpointError, ConfigError
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from tests import small_tokenizer
from tests.checkpoint.hf_folders import (
    CLOSE,
    ROWS,
    THEIRS,
    TOKENS,
    assert_same_tensors,
    make,
    stored,
    their_logits,
)

TEXT = "the best<|endoftext|> of  times\n, \u00e9 it"


def with_tokenizer(folder: Path, kind: str) -> dict[str, Any]:
    path = small_tokenizer.write(folder)
    if kind == "HFTokenizer":
        return {"tokenizer_type": kind, "vocab_file": str(path)}
    model = json.loads(path.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    if kind == "HFGPT2Tokenizer":
        path.unlink()
        return {"tokenizer_type": kind, "vocab_file": str(folder)}
    files = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    return {"tokenizer_type": kind} | {key: str(folder / name) for key, name in files.items()}


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer", "HFGPT2Tokenizer"])
def test_the_tokenizer_goes_along(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    model = make(tmp_path / "theirs")
    (tmp_path / "files").mkdir()
    config = from_dict({"load": str(model), **with_tokenizer(tmp_path / "files", kind)})
    ours = build_tokenizer(config)
    export(Checkpoint.open(model), config, tmp_path / "hf", tokenizer=ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT)["input_ids"] == ours.tokenize(TEXT)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod, ours.eod) == (0, 0)
    assert theirs.pad_token_id == ours.pad == 1
    assert len(theirs) == ours.vocab_size
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert written["eos_token_id"] == generation.eos_token_id == 0
    assert written["pad_token_id"] == generation.pad_token_id == 1


def test_a_tokenizer_without_files_there_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "theirs", vocab_size=512)
    config = from_dict({"load": str(model), "tokenizer_type": "CharLevelTokenizer"})
    export(Checkpoint.open(model), config, tmp_path / "hf", tokenizer=build_tokenizer(config))
    assert "warning: the folder has no tokenizer" in capfd.readouterr().err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "theirs", vocab_size=279)
    config = from_dict({"load": str(model)})
    with pytest.raises(CheckpointError, match="has 280 tokens"):
        export(Checkpoint.open(model), config, tmp_path / "hf", tokenizer=build_tokenizer(config))
    assert not (tmp_path / "hf").exists()


def halves_of_nothing(folder: Path) -> None:
    """Give every bias the smallest numbers there are, which have no half."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.copy_(torch.arange(tensor.numel()) * torch.finfo(tensor.dtype).smallest_normal)
            tensor.mul_(torch.finfo(tensor.dtype).eps)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["parallel", "sequential", "tied", "gpt_j"])
def test_import_then_export_is_bitwise(
    name: str, dtype: torch.dtype, tp: int, tmp_path: Path
) -> None:
    folder = make(tmp_path / "theirs", dtype, **THEIRS[name])
    halves_of_nothing(folder)
    step = import_folder(folder, tmp_path / "neox", tp=tp)
    config = load_config([step / "configs" / "hf.yml"], purpose="generate")
    again = Checkpoint.open(Path(config.load or ""))
    assert (again.tp, again.iteration, again.padded_vocab_size) == (tp, 0, ROWS)
    export(again, config, tmp_path / "ours", tokenizer=build_tokenizer(config))
    assert_same_tensors(stored(tmp_path / "ours"), stored(folder))
    tokenizer = (tmp_path / "ours" / "tokenizer.json").read_bytes()
    assert tokenizer == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["parallel", "sequential", "gpt_j", "gpt_j_tied"])
def test_an_imported_checkpoint_is_the_model(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", **THEIRS[name])
    step = import_folder(folder, tmp_path / "neox", tp=2)
    config = load_config([step / "configs" / "hf.yml"], purpose="evaluate")
    logits = load_model(config, ProcessGroups.single())(TOKENS)
    assert_close(logits, their_logits(folder, TOKENS), **CLOSE)
    (shard, _) = Checkpoint.open(step).shards(2)
    assert not shard.buffers and "mlp.linear1.weight" in shard.names.values()


def test_summands_of_a_bias_are_its_exact_sum(tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", torch.float16)
    halves_of_nothing(folder)
    step = import_folder(folder, tmp_path / "neox", tp=2)
    name = "attention.dense.bias"
    one, two = (shard.tensors[name] for shard in Checkpoint.open(step).shards(2))
    whole = load_file(folder / "model.safetensors")[f"gpt_neox.layers.0.{name}"]
    assert torch.equal(one + two, whole) and not torch.equal(one, two)


def test_a_tp_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not divisible"):
        import_folder(make(tmp_path / "theirs"), tmp_path / "neox", tp=3)
    assert not (tmp_path / "neox").exists()


def test_rows_that_tp_does_not_divide_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", vocab_size=287)
    with pytest.raises(CheckpointError, match="287 rows can't be cut into 2"):
        import_folder(folder, tmp_path / "neox", tp=2)
    assert not (tmp_path / "neox").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model of transformers"):
        import_folder(tmp_path, tmp_path / "neox")


def test_what_a_killed_import_left_is_no_obstacle(tmp_path: Path) -> None:
    aside = tmp_path / "neox/.unfinished/global_step0"
    aside.mkdir(parents=True)
    (aside / "layer_00-model_00-model_states.pt").write_bytes(b"half of it")
    (tmp_path / "neox/.lock").touch()
    import_folder(make(tmp_path / "theirs"), tmp_path / "neox")
    assert not aside.parent.exists() and (tmp_path / "neox/latest").is_file()
    with pytest.raises(CheckpointError, match="is there already, and not empty"):
        import_folder(tmp_path / "theirs", tmp_path / "neox")
