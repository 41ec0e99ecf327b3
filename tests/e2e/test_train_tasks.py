"""train.py told on its command line to score tasks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import scripts, small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE
from tests.world import World

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = BASE | {
        "data_path": "data",
        "tokenizer_type": "HFTokenizer",
        "vocab_file": "tokenizer.json",
        "split": "1,0,0",
        "eval_interval": 2,
        "eval_data_dir": str(ROOT / "configs/demo_eval"),
        "eval_own_documents": True,
        "log_dir": "logs",
    }
    (tmp_path / "model.yml").write_text(json.dumps(values))
    small_tokenizer.write(tmp_path)
    write_dataset(tmp_path / "data", [40] * 30, modulo=280)
    return tmp_path


def train(world: World, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    deepy = ROOT / "deepy.py"
    return scripts.run(world, deepy, "train.py", "model.yml", *arguments, cwd=folder)


def test_tasks_on_the_command_line_are_scored_at_every_validation(
    world: World, folder: Path
) -> None:
    run = train(world, folder, "--eval_tasks", "lambada", "piqa", "--limit", "2")
    assert (run.returncode, run.stderr) == (0, "")
    rows = map(json.loads, (folder / "logs/metrics.jsonl").read_text().splitlines())
    names = {f"validation/{name}" for name in ("lambada_openai_acc", "piqa_acc_norm")}
    assert [row["iteration"] for row in rows if names <= set(row)] == [2, 4]
    assert "validation results at iteration 2 | lambada_openai_perplexity value: " in run.stdout


def test_an_unknown_task_is_one_line_before_anything_is_trained(world: World, folder: Path) -> None:
    run = train(world, folder, "--eval_tasks", "piqqa")
    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: eval_tasks: lm-eval has no task 'piqqa'; did you mean piqa"
    )
    assert run.stderr.count("\n") == 1
    assert not (folder / "logs").exists()
