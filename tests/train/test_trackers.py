"""W&B and TensorBoard: what they are given, and that they cannot harm a run."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from neox.parallel.groups import ProcessGroups
from neox.train.metrics import RunLog, StepResult
from neox.train.trackers import Trackers, open_trackers
from tests.wandb_file import history_of, read_wandb_file


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def wandb_config(make_config, tmp_path):
    return make_config(
        use_wandb=True,
        wandb_project="a project",
        wandb_group="a group",
        wandb_run_name="a name",
        wandb_team="a team",
        log_dir=str(tmp_path / "logs"),
    )


def _the_record(records: list[wandb_internal_pb2.Record], kind: str):
    (found,) = [getattr(record, kind) for record in records if record.HasField(kind)]
    return found


def _offline_run(folder: Path) -> list[wandb_internal_pb2.Record]:
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return list(read_wandb_file(path))


def test_wandb_keeps_an_offline_run_without_an_account(
    no_wandb_account, wandb_config, tmp_path, capfd
):
    with open_trackers(wandb_config, rank=0) as trackers:
        trackers.log({"train/lm_loss": 7.0, "train/learning_rate": 1e-3}, step=1)
        trackers.log({"train/lm_loss": math.nan}, step=2)
        trackers.log({"validation/lm_loss": 6.0, "validation/lm_loss_ppl": 403.4}, step=2)
    printed = capfd.readouterr()
    assert printed.out.splitlines() == [
        "W&B has no API key here: the run is kept offline, `wandb sync` uploads it"
    ]
    assert printed.err == ""

    records = _offline_run(tmp_path / "logs")
    history = history_of(records)
    assert history.keys() == {1, 2}
    assert history[1]["train/lm_loss"] == 7.0
    assert history[1]["train/learning_rate"] == 1e-3
    assert math.isnan(history[2]["train/lm_loss"])
    assert history[2]["validation/lm_loss"] == 6.0
    assert history[2]["validation/lm_loss_ppl"] == 403.4
    run = _the_record(records, "run")
    assert run.project == "a project"
    assert run.run_group == "a group"
    assert run.display_name == "a name"
    assert run.entity == "a team"
    saved = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert saved["hidden_size"] == 128
    assert saved["optimizer"]["params"]["lr"] == 1e-3
    assert _the_record(records, "exit").exit_code == 0


def test_wandb_and_metrics_jsonl_hold_the_same_rows(no_wandb_account, make_config, tmp_path):
    config = make_config(use_wandb=True, log_dir=str(tmp_path), peak_theoretical_tflops=1.0)
    groups = ProcessGroups.single()
    with RunLog(config, groups, iteration=0, padded_vocab_size=1152) as run:
        for iteration in (1, 2, 3, 4):
            run.train_step(iteration, StepResult(7.0, 1e-3, 0.25, grad_norm=0.5, loss_scale=8.0))
        run.evaluation("validation", 4, {"lm_loss": 6.0, "lm_loss_ppl": math.exp(6.0)})
        run.evaluation("test", 4, {"lm_loss": 6.0, "lm_loss_ppl": math.exp(6.0)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = {row.pop("iteration"): row for row in map(json.loads, lines)}
    for row in rows.values():
        del row["time"], row["tokens"]
    assert history_of(_offline_run(tmp_path)) == rows
    assert list(rows) == [1, 2, 3, 4]


def test_wandb_is_told_that_a_run_failed(no_wandb_account, wandb_config, tmp_path):
    with pytest.raises(ZeroDivisionError), open_trackers(wandb_config, rank=0):
        raise ZeroDivisionError
    assert _the_record(_offline_run(tmp_path / "logs"), "exit").exit_code == 1


def test_wandb_goes_offline_when_its_server_does_not_answer(
    no_wandb_account, make_config, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused
    config = make_config(use_wandb=True, log_dir=str(tmp_path))
    with open_trackers(config, rank=0) as trackers:
        trackers.log({"train/lm_loss": 7.0}, step=1)
    assert "W&B cannot be reached, the run is kept offline" in capfd.readouterr().err
    assert history_of(_offline_run(tmp_path))[1]["train/lm_loss"] == 7.0


def test_wandb_mode_of_the_environment_is_kept(
    no_wandb_account, wandb_config, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_trackers(wandb_config, rank=0) as trackers:
        trackers.log({"train/lm_loss": 7.0}, step=1)
    assert capfd.readouterr() == ("", "")
    assert history_of(_offline_run(tmp_path / "logs"))[1]["train/lm_loss"] == 7.0


@pytest.fixture
def resumable(make_config, tmp_path):
    def make(**changes):
        save = str(tmp_path / "checkpoints")
        values = {"save": save, "load": save, "checkpoint_factor": 2, "use_wandb": True}
        return make_config(**values, log_dir=str(tmp_path / "logs"), **changes)

    return make


def _log(config, iteration: int, steps: Iterable[int]) -> None:
    with open_trackers(config, rank=0, iteration=iteration) as trackers:
        for step in steps:
            trackers.log({"train/lm_loss": step + iteration / 100}, step)


def test_a_resumed_wandb_run_is_told_anew(no_wandb_account, resumable, tmp_path):
    _log(resumable(), 0, range(1, 6))
    _log(resumable(lr_decay_style="linear"), 3, range(4, 8))
    records = _offline_run(tmp_path / "logs")
    values = {step: row["train/lm_loss"] for step, row in history_of(records).items()}
    assert values == {1: 1, 2: 2, 3: 3, 4: 4.03, 5: 5.03, 6: 6.03, 7: 7.03}
    times = [
        json.loads(item.value_json)
        for record in records
        for item in record.history.item
        if item.nested_key[:1] == ["_timestamp"]
    ]
    assert len(times) == 7 and times == sorted(times) and times[3] - times[2] > 0.01


@pytest.mark.parametrize(
    ("changes", "iteration", "runs"),
    [
        ({}, 0, 1),  # killed before its first checkpoint
        ({"seed": 2}, 0, 2),
        ({"load": None}, 0, 2),
        ({"load": "elsewhere"}, 3, 2),
    ],
)
def test_what_is_the_same_wandb_run(
    no_wandb_account, resumable, tmp_path, changes, iteration, runs
):
    _log(resumable(), 0, range(1, 4))
    config = resumable()
    _log(dataclasses.replace(config, **changes), iteration, range(iteration + 1, 5))
    paths = list((tmp_path / "logs").glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == len({path.name for path in paths}) == runs


def test_a_server_is_sent_what_it_lacks(resumable, monkeypatch):
    told: list[tuple[int, dict[str, float]]] = []

    class Run:
        step, offline = 0, False

        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, values))

        def finish(self, exit_code: int) -> None:
            pass

    started: list[dict[str, object]] = []
    run = Run()

    def init(**settings: object) -> Run:
        started.append(settings)
        return run

    fake = types.SimpleNamespace(
        init=init, login=lambda **_: True, Settings=dict, teardown=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    _log(resumable(), 0, range(1, 6))
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    told.clear()
    Run.step = 3  # it got 1 and 2 before the kill
    _log(resumable(), 4, range(5, 7))
    assert [step for step, _ in told] == [3, 4, 5, 6]
    told.clear()
    Run.step = 9  # it got more than the checkpoint: that is not sent again
    _log(resumable(), 6, range(7, 11))
    assert [step for step, _ in told] == [9, 10]
    assert len({settings["id"] for settings in started}) == 1
    assert {settings["resume"] for settings in started} == {"allow"}


def test_other_ranks_track_nothing(wandb_config, tmp_path):
    with open_trackers(wandb_config, rank=1) as trackers:
        trackers.log({"train/lm_loss": 7.0}, step=1)
    assert not (tmp_path / "logs").exists()


def test_tensorboard_gets_every_value_and_drops_later_points_of_an_earlier_run(
    make_config, monkeypatch
):
    points, closed = [], []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            points.append((log_dir, "purge", purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            points.append((key, value, step))

        def close(self) -> None:
            closed.append(True)

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with open_trackers(make_config(tensorboard_dir="tb"), rank=0, iteration=10) as trackers:
        trackers.log({"train/lm_loss": 7.0, "train/learning_rate": 1e-3}, step=11)
    assert points == [
        ("tb", "purge", 11),
        ("train/lm_loss", 7.0, 11),
        ("train/learning_rate", 1e-3, 11),
    ]
    assert closed == [True]
    open_trackers(make_config(tensorboard_dir="tb"), rank=0)  # an evaluation: nothing is dropped
    assert points[-1] == ("tb", "purge", None)


def test_a_missing_tensorboard_costs_one_warning(make_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with open_trackers(make_config(tensorboard_dir="tb"), rank=0) as trackers:
        trackers.log({"train/lm_loss": 7.0}, step=1)
    assert capsys.readouterr().err.splitlines() == [
        "warning: TensorBoard is left out: tensorboard_dir needs `pip install tensorboard`"
    ]


class Recorder:
    """A tracker that remembers, and raises once it is told to."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.closed = False
        self.breaks_at = breaks_at

    def flush(self) -> None:
        pass

    def log(self, values, step) -> None:
        if step == self.breaks_at:
            raise OSError("disk full\nsecond line")
        self.steps.append(step)

    def close(self, failed: bool = False) -> None:
        self.closed = True
        if self.breaks_at is not None:
            raise OSError("disk full")


def test_a_tracker_that_raises_is_left_out_after_one_warning(capsys):
    broken, sound = Recorder(breaks_at=2), Recorder()
    trackers = Trackers()
    trackers.add("broken", lambda: broken)
    trackers.add("sound", lambda: sound)
    for step in (1, 2, 3):
        trackers.log({}, step)
    trackers.close()
    assert broken.steps == [1]
    assert sound.steps == [1, 2, 3]
    assert sound.closed
    assert capsys.readouterr().err.splitlines() == [
        "warning: broken failed, the run goes on without it: disk full"
    ]


def test_a_tracker_that_raises_at_the_end_does_not_stop_the_others_from_closing(capsys):
    broken, sound = Recorder(breaks_at=9), Recorder()
    with Trackers() as trackers:
        trackers.add("broken", lambda: broken)
        trackers.add("sound", lambda: sound)
    assert sound.closed
    assert "broken failed" in capsys.readouterr().err
