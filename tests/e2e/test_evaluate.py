"""evaluate.py as a command: killed and started again, from the cache, and behind lm-eval's own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import scripts, small_tokenizer
from tests.evaluation.sums import write_sums
from tests.models import BASE
from tests.scripts import Script
from tests.world import World
from tools import checkpoint
from tools.register_lm_eval import LINE

DEEPY = (Path(__file__).parents[2] / "deepy.py", "evaluate.py", "model.yml")
# LINE is what Python runs at its start where tools/register_lm_eval.py was run.
LM_EVAL = f"{LINE}\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
LENGTH = 64
MODEL = {
    **{key: BASE[key] for key in ("num_layers", "hidden_size", "num_attention_heads", "pos_emb")},
    **{key: BASE[key] for key in ("rotary_pct", "no_weight_tying", "gpt_j_residual", "precision")},
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "tokenizer_type": "HFTokenizer",
    "make_vocab_size_divisible_by": 64,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, its configuration, and a task of 400 texts."""
    for name, value in {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    write_sums(tmp_path, [f"{i} times {i + 1} is {i * (i + 1)}" for i in range(400)])
    small_tokenizer.write(tmp_path)
    values = {
        **MODEL,
        "vocab_file": str(tmp_path / "tokenizer.json"),
        "load": str(tmp_path / "model"),
        "include_path": str(tmp_path),
        "eval_tasks": ["sums"],
        "eval_cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "model.yml").write_text(json.dumps(values))
    arguments = ["--config", str(tmp_path / "model.yml"), "--output", str(tmp_path / "model")]
    assert checkpoint.main(["synthesize", *arguments]) == 0
    return tmp_path


def evaluate(world: World, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The results of a run, and what it printed."""
    before = set(folder.glob("*.json"))
    done = scripts.run(world, *DEEPY, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    [path] = set(folder.glob("*eval_results_*.json")) - before
    return json.loads(path.read_text()), done.stdout


def lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in (folder / "cache").rglob("*.jsonl"))


def times(limit: float) -> Iterator[None]:
    """Again and again until `limit` seconds have passed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    raise AssertionError(f"not done after {limit} s")


def test_a_killed_run_goes_on_where_it_stopped(world: World, folder: Path) -> None:
    slow = ("--batch_size", "1")
    run = Script(world, [*DEEPY, *slow], folder, folder / "stderr")
    for _ in times(60):
        if lines(folder) >= 16 or run.poll() is not None:
            break
    run.kill()
    run.wait()
    known = lines(folder)
    assert 0 < known < 400, "it was to be killed in the middle"
    assert not list(folder.glob("*eval_results_*"))

    again, printed = evaluate(world, folder, *slow)
    # The last line may have been cut.
    assert again["answers"]["asked"] == 400
    assert 400 - known <= again["answers"]["computed"] <= 400 - known + 1
    assert f"{400 - again['answers']['computed']} of 400 answers are of earlier runs" in printed

    fresh, printed = evaluate(world, folder, "--set", "eval_use_cache=false")
    assert fresh["answers"]["computed"] == 400 and "earlier runs" not in printed
    third, printed = evaluate(world, folder)
    assert third["answers"]["computed"] == 0 and "400 of 400 answers are of earlier" in printed
    assert third["results"] == again["results"]
    for metric in ("acc", "ppl"):
        expected = fresh["results"]["sums"][metric]
        assert again["results"]["sums"][metric] == pytest.approx(expected, rel=1e-6)
    [samples] = fresh["samples"].values()
    answers = [json.loads(line) for line in (folder / samples).read_text().splitlines()]
    assert [answer["doc_id"] for answer in answers] == list(range(400))


def test_lm_evals_own_command_scores_the_same(world: World, folder: Path) -> None:
    ours, _ = evaluate(world, folder, "--set", "eval_use_cache=false")
    command = [sys.executable, "-c", LM_EVAL, "run", "--model", "neox", "--tasks", "sums"]
    command += ["--model_args", "config=model.yml", "--include_path", ".", "--output_path", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (folder / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["sums"]
    for metric in ("acc,none", "perplexity,none"):
        assert theirs[metric] == pytest.approx(ours["results"]["sums"][metric], rel=1e-6)

    command[command.index("config=model.yml")] = "config=mode.yml"
    (folder / "command.py").write_text(LM_EVAL)
    done = scripts.run(world, folder / "command.py", *command[3:], cwd=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "mode.yml" in done.stderr
