"""One W&B run for one training run, however often that is killed: read from W&B's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_kill import EVERY, Life, make_run
from tests.wandb_file import history_of, read_wandb_file

ITERATIONS = 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    folder = tmp_path / "run"
    make_run(folder, 1, ITERATIONS)
    change(folder, use_wandb=True, split="8,1,1", eval_interval=4, eval_iters=1)
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "model.yml"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lives(folder: Path, *killed_after: int) -> None:
    """Start the run, kill it after so many iterations, start it again ...; then let it finish."""
    for iterations in killed_after:
        life = Life(folder)
        life.read(iterations)
        life.kill()
    last = Life(folder)
    last.read()
    assert last.process.wait() == 0, (folder / "stderr").read_text()


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (folder / "logs/metrics.jsonl").read_text().splitlines())
    return {
        row.pop("iteration"): {k: v for k, v in row.items() if k not in ("time", "tokens")}
        for row in rows
    }


def test_a_killed_and_resumed_run_is_one_run(folder: Path) -> None:
    lives(folder, 2, EVERY + 2, EVERY + 1)  # before the first checkpoint, and twice after one
    (path,) = folder.rglob("*.wandb")
    records = list(read_wandb_file(path))
    assert path.parent.parent == folder / "logs/wandb"
    history = history_of(records)
    assert list(history) == list(range(1, ITERATIONS + 1))
    assert history == metrics(folder)
    assert "validation/lm_loss" in history[4] and "test/lm_loss" in history[12]
    assert (folder / "stderr").read_text() == ""
    ids = {record.run.run_id for record in records if record.HasField("run")}
    assert ids == {json.loads((folder / "checkpoints/wandb_run.json").read_text())["id"]}


def test_a_run_that_begins_anew_is_another_run(folder: Path) -> None:
    lives(folder, 2)
    (first,) = folder.rglob("*.wandb")
    lives(folder)  # nothing left to train: still the first one
    (again,) = folder.rglob("*.wandb")
    assert again.name == first.name
    change(folder, load=None, seed=2)
    lives(folder)
    (other,) = {path for path in folder.rglob("*.wandb") if path.name != first.name}
    for path in (again, other):
        assert list(history_of(read_wandb_file(path))) == list(range(1, ITERATIONS + 1))
    assert list(metrics(folder)) == list(range(1, ITERATIONS + 1))
    assert len((folder / "logs/metrics-2.jsonl").read_text().splitlines()) == ITERATIONS
