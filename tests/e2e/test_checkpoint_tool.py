"""tools/checkpoint.py as it is typed: what it writes, says, and with which status it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from tests import scripts
from tests.checkpoint import mesh_folders
from tests.models import BASE, VOCAB, config_of, tokens, write_model
from tests.world import World
from tools import checkpoint as tool

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools/checkpoint.py"
PATIENCE_S = 180.0  # for processes to come up on a busy machine; nothing is measured with it


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, TOOL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        **options,
    )


def run(world: World, *arguments: str | Path) -> tuple[int, str, str]:
    done = scripts.run(world, TOOL, *arguments, cwd=REPOSITORY)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yml"
    path.write_text(json.dumps({**BASE, "make_vocab_size_divisible_by": 32}))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with two steps of one shard."""
    for iteration in (5, 7):
        write_model(tmp_path / "saved", iteration, seed=iteration)
    return tmp_path / "saved"


def call(*arguments: str | Path) -> int:
    """In this process, which has torch already."""
    return tool.main([str(argument) for argument in arguments])


def test_there_and_back(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four, hf, back = tmp_path / "four", tmp_path / "hf", tmp_path / "back"
    assert call("reshard", saved, "--model_parallel_size", "4", "--output", four) == 0
    assert f"{four}/global_step7: model_parallel_size 4, from 1" in capsys.readouterr().out
    assert (four / "latest").read_text() == "global_step7"
    assert call("verify", four) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    assert call("diff", saved, four / "global_step7") == 0
    assert capsys.readouterr().out == "28 tensors: 28 bitwise equal\n"

    assert call("convert", four, "--to", "transformers", "--output", hf) == 0
    assert "gets no tokenizer" in capsys.readouterr().err
    assert call("convert", hf, "--to", "neox", "--model_parallel_size", "2", "--output", back) == 0
    assert Checkpoint.open(back).tp == 2
    for other in (four, hf, back):
        assert call("diff", saved, other) == 0
        assert call("verify", other) == 0
    assert call("diff", saved, back, "--iteration", "7") == 2


def test_folders_of_jax_go_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mesh_folders.gpt_j()
    jax = mesh_folders.write(tmp_path / "step_7", model.state_dict(), slim=False)
    neox, hf, four = tmp_path / "neox", tmp_path / "hf", tmp_path / "four"
    config = tmp_path / "heads.yml"
    config.write_text(json.dumps({"load": str(jax), **mesh_folders.KEYS}))
    assert call("inspect", jax) == 0
    told = capsys.readouterr().out
    assert "a checkpoint of mesh-transformer-jax" in told
    assert "of JAX, which stays behind" in told
    assert "not told: num_attention_heads, num_kv_heads, rotary_pct" in told
    assert call("verify", jax) == 0
    capsys.readouterr()

    assert call("convert", jax, "--to", "neox", "--output", neox) == 2
    assert "does not tell num_attention_heads and rotary_pct" in capsys.readouterr().err
    tp = ("--model_parallel_size", "2", "--config", config)
    assert call("convert", jax, "--to", "neox", *tp, "--output", neox) == 0
    assert "load: " + str(neox) in (neox / "global_step0/configs/hf.yml").read_text()
    assert call("reshard", jax, *tp, "--output", four) == 0
    capsys.readouterr()
    for other in (neox, four):
        assert call("diff", jax, other) == 0
        assert capsys.readouterr().out == "21 tensors: 21 bitwise equal\n"

    assert call("convert", jax, "--to", "transformers", "--config", config, "--output", hf) == 0
    assert json.loads((hf / "config.json").read_text())["dtype"] == "bfloat16"
    exported = load_file(hf / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported[name].float(), tensor), name


def test_an_earlier_step_may_be_chosen(saved: Path, tmp_path: Path) -> None:
    flags = ("--model_parallel_size", "2", "--iteration", "5", "--output", tmp_path / "new")
    assert call("reshard", saved, *flags) == 0
    assert Checkpoint.open(tmp_path / "new").iteration == 5
    assert call("diff", saved / "global_step5", tmp_path / "new") == 0


def test_different_is_1_and_trouble_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("diff", saved / "global_step5", saved / "global_step7") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer 00 word_embeddings.weight: different by up to 0.")
    assert last == "28 tensors: 28 different"
    write_model(tmp_path / "tanh", 7, seed=7, bias_gelu_fusion=True)
    assert call("diff", saved, tmp_path / "tanh") == 1
    assert capsys.readouterr().out.startswith("architecture: bias_gelu_fusion is false")
    flip(layer_file(saved / "global_step7", 3, 0))
    assert call("diff", saved, tmp_path / "tanh") == 2
    assert "is damaged" in capsys.readouterr().err


def test_every_damaged_file_is_a_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(layer_file(saved / "global_step7", 3, 0))
    layer_file(saved / "global_step7", 5, 0).unlink()
    assert call("verify", saved) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "layer_03" in lines[0] and "layer_05" in lines[1]
    assert call("verify", saved, "--iteration", "5") == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_names_and_precision_may_be_changed(saved: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old" / "global_step3", tmp_path / "new"
    old.mkdir(parents=True)
    for path in (saved / "global_step7").glob("layer_*"):
        tensors = torch.load(path, weights_only=True)
        renamed = {key.replace("linear1", "dense_h_to_4h"): t for key, t in tensors.items()}
        torch.save(renamed, old / path.name)
    config = tmp_path / "small.yml"
    config.write_text(json.dumps({**BASE, "precision": "fp16"}))
    command = ("convert", old, "--to", "neox", "--output", new, "--dtype", "fp16")
    assert call(*command) == 2  # nothing tells the heads
    assert call(*command, "--config", config, "--model_parallel_size", "2") == 0
    shard = torch.load(layer_file(new / "global_step3", 2, 1), weights_only=True)
    assert shard["mlp.linear1.weight"].dtype == torch.float16


def test_inspect_lists_tensors_and_values(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", saved, "--values") == 0
    assert "mlp.linear2.bias" in capsys.readouterr().out
    assert call("inspect", saved, "--tensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["iteration"], found["shards"], len(found["tensors"])) == (7, 1, 28)


def test_20B_is_synthesized_at_any_depth_and_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--num_layers", "3", "--hidden_size", "64", "--num_attention_heads", "2")
    command = ("synthesize", "--config", REPOSITORY / "configs/20B.yml", *size)
    assert call(*command, "--output", tmp_path / "new") == 0
    assert "vocabulary: 50277 tokens, as 20B's" in capsys.readouterr().out
    checkpoint = Checkpoint.open(tmp_path / "new")
    assert (checkpoint.tp, checkpoint.padded_vocab_size, checkpoint.depth) == (2, 50432, 3)
    assert checkpoint.indices == [0, 2, 3, 4, 6, 7]
    (first, _) = checkpoint.shards(2)
    assert "attention.rotary_emb.inv_freq" in first.buffers
    assert first.tensors["mlp.linear1.weight"].dtype == torch.float16
    flags = ("--vocab_size", "100", "--model_parallel_size", "1", "--no-legacy_names")
    flags += ("--set", "gpt_j_residual=false", "--dtype", "fp32")
    assert call(*command, *flags, "--output", tmp_path / "other") == 0
    other = Checkpoint.open(tmp_path / "other")
    assert (other.tp, other.padded_vocab_size) == (1, 128)
    assert other.shards(2)[0].buffers == {}


@pytest.mark.parametrize("grid", [(1, 1), (2, 1)], ids=str)
def test_logits_are_those_of_the_model(
    world: World, saved: Path, config: Path, tmp_path: Path, grid: tuple[int, int]
) -> None:
    np.savez(tmp_path / "ids.npz", tokens=tokens(3).numpy())
    tp, pp = (f"--set={key}={size}" for key, size in zip(SIZES, grid, strict=True))
    files = ("--tokens", tmp_path / "ids.npz", "--output", tmp_path / "new/logits.npz")
    command = ("logits", "--config", config, "--load", saved / "global_step5", *files, tp, pp)
    status, stdout, stderr = run(world, *command)
    assert status == 0, stderr
    assert stdout.endswith(f"logits.npz: logits at tp {grid[0]} x pp {grid[1]}\n")
    found = torch.from_numpy(np.load(tmp_path / "new/logits.npz")["logits"])
    single = ProcessGroups.single()
    expected = load_model(config_of(load=str(saved), iteration=5), single)(tokens(3))
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_logits_are_fp32_whatever_the_model_was_trained_in(
    world: World, saved: Path, config: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.yml"
    half.write_text(json.dumps({"bf16": {"enabled": True}}))
    np.savez(tmp_path / "ids.npz", tokens=tokens(3).numpy())
    files = ("--tokens", tmp_path / "ids.npz", "--output", tmp_path / "logits.npz")
    command = ("logits", "--config", config, half, "--load", saved, *files)
    found = []
    for precision in ((), ("--set", "precision=bfloat16")):
        status, _, stderr = run(world, *command, *precision)
        assert status == 0, stderr
        found.append(torch.from_numpy(np.load(tmp_path / "logits.npz")["logits"]))
    expected = load_model(config_of(load=str(saved), iteration=7), ProcessGroups.single())(
        tokens(3)
    )
    assert expected is not None
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    assert (found[1] - expected).abs().max() > 1e-4


SIZES = ("model_parallel_size", "pipe_parallel_size")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.zeros((1, 2)), "tokens is float64 [1, 2], but token ids are integers"),
        (np.full((1, 2), VOCAB), "the token ids run from 64 to 64"),
        (None, "does not exist"),
    ],
)
def test_bad_token_ids_are_one_line(
    world: World, saved: Path, config: Path, tmp_path: Path, ids: np.ndarray | None, said: str
) -> None:
    if ids is not None:
        np.savez(tmp_path / "ids.npz", tokens=ids)
    files = ("--tokens", tmp_path / "ids.npz", "--output", tmp_path / "logits.npz")
    status, stdout, stderr = run(world, "logits", "--config", config, "--load", saved, *files)
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "logits.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("inspect none", "none is not a folder"),
        ("verify .", "no `latest` file"),
        ("diff saved none", "none is not a folder"),
        ("reshard saved --model_parallel_size 3 --output new", "model_parallel_size"),
        ("reshard saved --output new", "say how many shards"),
        ("reshard saved --model_parallel_size 2 --output saved", "global_step7 is there already"),
        ("reshard saved --model_parallel_size 2 --output small.yml", "cannot be written"),
        ("reshard saved --model_parallel_size 2 --output new --iteration 6", "iteration 6 asks"),
        (
            "reshard saved --model_parallel_size 4 --output new --padded_vocab_size 66",
            "--padded_vocab_size 68",
        ),
        (
            "reshard saved --model_parallel_size 2 --output new --config other.yml",
            "num_layers is 3",
        ),
        ("convert saved --to transformers --output new --model_parallel_size 2", "is whole"),
        ("convert saved --to neox --output new --config none.yml", "none.yml"),
        ("synthesize --config small.yml --output saved/global_step7/latest/x", "cannot be written"),
        ("synthesize --config small.yml --output new --set hidden_size=33", "hidden_size"),
        ("logits --config small.yml --tokens x.npz --output y.npz", "load is missing"),
    ],
)
def test_what_is_wrong_is_one_error(
    saved: Path,
    config: Path,
    tmp_path: Path,
    arguments: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "global_step7/latest").touch()
    (tmp_path / "other.yml").write_text(json.dumps({**BASE, "num_layers": 3}))
    assert call(*arguments.split()) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" or "vocabulary:" in stdout
    assert stderr.startswith("error: ") and said in stderr
    assert not (tmp_path / "new/latest").exists()


@pytest.mark.parametrize(
    "arguments",
    ["", "inspct x", "reshard x", "reshard x --model_parallel_size 0 --output y"],
)
def test_wrong_usage_is_status_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(*arguments.split())
    assert left.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(saved: Path) -> None:
    process = start("inspect", saved, "--tensors")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(PATIENCE_S) == 128 + signal.SIGPIPE


def test_an_interrupt_ends_quietly(config: Path, tmp_path: Path) -> None:
    size = ("--num_layers", "50", "--hidden_size", "2048", "--num_attention_heads", "4")
    process = start("synthesize", "--config", config, *size, "--output", tmp_path / "new")
    aside = tmp_path / "new/.unfinished/global_step0"
    wait_for(aside, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (130, "")
    assert not (tmp_path / "new/latest").exists()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
