"""One W&B run for one training run, however often that is killed: read from W&B's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.test_kill import EVERY, Life, make_run
from tests.wandb_file import history_of, read_wandb_file
from tests.world import World

ITERATIONS = 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    folder = tmp_path / "run"
    make_run(folder, 1, ITERATIONS)
    change(
        folder, use_wandb=True, tensorboard_dir="tb", split="8,1,1", eval_interval=4, eval_iters=1
    )
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "model.yml"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lives(world: World | None, folder: Path, *killed_after: int) -> None:
    """Start the run, kill it after so many iterations, start it again ...; then let it finish.

    With `world`, Python need not start anew.
    """
    for iterations in killed_after:
        life = Life(folder, world=world)
        life.read(iterations)
        life.kill()
    last = Life(folder, world=world)
    last.read()
    assert last.process.wait() == 0, (folder / "stderr").read_text()


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (folder / "logs/metrics.jsonl").read_text().splitlines())
    return {
        row.pop("iteration"): {k: v for k, v in row.items() if k not in ("time", "tokens")}
        for row in rows
    }


def test_a_killed_and_resumed_run_is_one_run(world: World, folder: Path) -> None:
    lives(
        world, folder, 2, EVERY + 2, EVERY + 1
    )  # before the first checkpoint, and twice after one
    (path,) = folder.rglob("*.wandb")
    records = list(read_wandb_file(path))
    assert path.parent.parent == folder / "logs/wandb"
    history = history_of(records)
    assert list(history) == list(range(1, ITERATIONS + 1))
    assert history == metrics(folder)
    assert "validation/lm_loss" in history[4] and "test/lm_loss" in history[12]
    assert (folder / "stderr").read_text() == ""
    points = EventAccumulator(str(folder / "tb"))
    points.Reload()
    for key in ("train/lm_loss", "validation/lm_loss"):
        expected = [(step, row[key]) for step, row in history.items() if key in row]
        found = [(point.step, point.value) for point in points.Scalars(key)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        if key.startswith("train"):  # the last step is validated twice, and the first one kept
            assert [v for _, v in found] == pytest.approx([v for _, v in expected])
    ids = {record.run.run_id for record in records if record.HasField("run")}
    assert ids == {json.loads((folder / "checkpoints/wandb_run.json").read_text())["id"]}


def test_a_run_that_begins_anew_is_another_run(world: World, folder: Path) -> None:
    lives(world, folder, 2)
    (first,) = folder.rglob("*.wandb")
    # As W&B names the folder of a run that is the second with its id in a second.
    first.parent.rename(first.parent.with_name(f"{first.parent.name}-1"))
    lives(world, folder)  # nothing left to train: still the first one
    (again,) = folder.rglob("*.wandb")
    assert again.name == first.name
    change(folder, load=None, seed=2)
    lives(world, folder)
    (other,) = {path for path in folder.rglob("*.wandb") if path.name != first.name}
    for path in (again, other):
        assert list(history_of(read_wandb_file(path))) == list(range(1, ITERATIONS + 1))
    assert list(metrics(folder)) == list(range(1, ITERATIONS + 1))
    assert len((folder / "logs/metrics-2.jsonl").read_text().splitlines()) == ITERATIONS


EVERY_STEP = {"train/learning_rate", "train/lm_loss", "train/grad_norm"}
INTERVAL = {
    "runtime/samples_per_sec",
    "runtime/iteration_time",
    "runtime/steps_per_sec",
    "runtime/tokens_per_sec",
    "runtime/flops_per_sec_per_gpu",
    "runtime/model_flops_utilization",
    "runtime/hardware_flops_utilization",
    "timers/forward",
    "timers/backward",
    "timers/backward-backward",
    "timers/backward-allreduce",
    "timers/optimizer",
    "timers/batch generator",
}
NORMS = {
    "gradient_norms/2.mlp.linear1.weight",
    "pct_grad_zeros/2.mlp.linear1.weight",
    "parameter_norms/2.mlp.linear1.weight",
    "optimizer_state_norms/0_exp_avg",
    "optimizer_state_norms/0_exp_avg_sq",
}
VALIDATION = {"validation/lm_loss", "validation/lm_loss_ppl"}


def test_every_key_of_upstream_is_in_the_run(folder: Path) -> None:
    change(
        folder,
        train_iters=4,
        lr_decay_iters=4,
        log_interval=2,
        pipe_parallel_size=0,
        wall_clock_breakdown=True,
        peak_theoretical_tflops=0.1,
        log_grad_norm=True,
        log_grad_pct_zeros=True,
        log_param_norm=True,
        log_optimizer_states=True,
        profile=True,
        profile_step_start=2,
        profile_step_stop=4,
    )
    lives(None, folder)  # what the profiler says is silenced before torch is imported
    (path,) = folder.rglob("*.wandb")
    history = history_of(read_wandb_file(path))
    for step, row in history.items():
        assert row.keys() >= EVERY_STEP | NORMS
        assert row.keys() >= INTERVAL or step % 2 == 1
        assert row.keys().isdisjoint(INTERVAL) or step % 2 == 0
    assert history[4].keys() >= VALIDATION | {"test/lm_loss", "test/lm_loss_ppl"}
    (trace,) = (folder / "tb").glob("*.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"ProfilerStep#2", "ProfilerStep#3"}
    assert names.isdisjoint({"ProfilerStep#1", "ProfilerStep#4"})
    assert (folder / "stderr").read_text() == ""
