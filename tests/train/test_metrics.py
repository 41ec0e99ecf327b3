"""What a run writes into metrics.jsonl and prints, and what it keeps when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from neox.train.metrics import RunLog, StepResult, flops_per_iteration, mean_losses

STEP = StepResult(loss=7.0, learning_rate=1e-3, seconds=0.25, grad_norm=0.5)


def _run_log(config, iteration=0, rank=0, dp=1) -> RunLog:
    groups = ProcessGroups(Topology(dp=dp), rank, torch.device("cpu"))
    return RunLog(config, groups, iteration=iteration, padded_vocab_size=1152)


def _rows(folder: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    for row in rows:
        assert row.pop("time") > 1.7e9
        assert row.pop("tokens") == row["iteration"] * 8 * 128
    return rows


def _train(config, iterations, **kwargs) -> None:
    with _run_log(config, **kwargs) as run:
        for iteration in iterations:
            run.train_step(iteration, dataclasses.replace(STEP, loss=7.0 - iteration / 10))


def test_one_object_per_iteration_with_the_keys_of_wandb(make_config, tmp_path):
    _train(make_config(log_dir=str(tmp_path), peak_theoretical_tflops=0.1), [1, 2, 3])
    first, second, third = _rows(tmp_path)
    assert first == {
        "iteration": 1,
        "train/learning_rate": 1e-3,
        "train/lm_loss": 6.9,
        "train/grad_norm": 0.5,
    }
    assert third.keys() == first.keys()
    assert second.keys() - first.keys() == {
        "runtime/samples_per_sec",
        "runtime/iteration_time",
        "runtime/steps_per_sec",
        "runtime/tokens_per_sec",
        "runtime/flops_per_sec_per_gpu",
        "runtime/model_flops_utilization",
        "runtime/hardware_flops_utilization",
    }
    assert second["runtime/iteration_time"] == 0.25
    assert second["runtime/steps_per_sec"] == 4
    assert second["runtime/samples_per_sec"] == 8 / 0.25
    assert second["runtime/tokens_per_sec"] == 8 * 128 / 0.25


def test_a_line_is_on_disk_before_the_next_step(make_config, tmp_path):
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        for iteration in (1, 2):
            run.train_step(iteration, STEP)
            assert len(_rows(tmp_path)) == iteration


def test_an_evaluation_joins_the_line_of_its_iteration(make_config, tmp_path, capsys):
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        run.train_step(1, STEP)
        run.evaluation("validation", 1, {"lm_loss": 6.0, "lm_loss_ppl": math.exp(6.0)})
        run.evaluation("test", 1, {"lm_loss": 5.0}, at="the end of training for test data")
        run.train_step(2, STEP)
    first, second = _rows(tmp_path)
    assert first["train/lm_loss"] == 7.0
    assert first["validation/lm_loss"] == 6.0
    assert first["validation/lm_loss_ppl"] == math.exp(6.0)
    assert first["test/lm_loss"] == 5.0
    assert second["iteration"] == 2
    printed = capsys.readouterr().out
    assert " validation results at iteration 1 | lm_loss value: 6.000000E+00 | lm_loss" in printed
    assert " test results at the end of training for test data | lm_loss value: 5.0" in printed


def test_loss_scale_and_further_losses_are_logged_when_there_are_any(make_config, tmp_path, capsys):
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        for iteration in (1, 2):
            step = StepResult(2.0, 1e-3, 0.25, loss_scale=1024.0, metrics={"kl": iteration})
            run.train_step(iteration, step)
    assert [row["train/kl"] for row in _rows(tmp_path)] == [1, 2]
    assert _rows(tmp_path)[0]["train/loss_scale"] == 1024.0
    assert "train/grad_norm" not in _rows(tmp_path)[0]
    assert "kl: 1.500000E+00 | loss scale: 1024.0 |" in capsys.readouterr().out


def test_the_console_shows_means_over_the_interval_that_was_seen(make_config, capsys):
    config = make_config(log_interval=4)
    with _run_log(config, iteration=1) as run:  # resumed inside an interval: 3 of 4 iterations
        for iteration, loss in enumerate([1.0, 2.0, 6.0, 4.0], start=2):
            run.train_step(iteration, dataclasses.replace(STEP, loss=loss, seconds=loss))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "samples/sec" in line]
    assert "iteration        4/      20" in line
    assert "elapsed time per iteration (ms): 3000.0" in line
    assert "lm_loss: 3.000000E+00" in line


def test_skipped_iterations_are_counted_and_left_out_of_the_mean(make_config, capsys):
    steps = [
        dataclasses.replace(STEP, loss=math.inf, skipped=True),
        dataclasses.replace(STEP, loss=3.0),
    ]
    with _run_log(make_config()) as run:
        for iteration, step in enumerate(steps, start=1):
            run.train_step(iteration, step)
    printed = capsys.readouterr().out
    assert "lm_loss: 3.000000E+00" in printed
    assert "skipped iterations:   1 | number of nan iterations:   1 |" in printed
    assert math.isnan(mean_losses(steps[:1])["lm_loss"])


def test_values_that_json_lacks_become_null(make_config, tmp_path):
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        run.train_step(1, dataclasses.replace(STEP, loss=math.nan, grad_norm=math.inf))
    (row,) = _rows(tmp_path)
    assert row["train/lm_loss"] is None
    assert row["train/grad_norm"] is None
    assert row["train/learning_rate"] == 1e-3


def test_resuming_drops_what_came_after_the_checkpoint(make_config, tmp_path, capsys):
    config = make_config(log_dir=str(tmp_path))
    _train(config, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 8, "train/lm_lo')  # the machine went down here
    _train(config, range(5, 10), iteration=4)
    assert [row["iteration"] for row in _rows(tmp_path)] == list(range(1, 10))
    assert "dropped 4 lines of an earlier run after iteration 4" in capsys.readouterr().out


def test_a_resumed_run_still_has_one_line_per_iteration(make_config, tmp_path):
    config = make_config(log_dir=str(tmp_path))
    _train(config, [1, 2])
    with _run_log(config, iteration=2) as run:
        run.evaluation("validation", 2, {"lm_loss": 6.0})
        run.train_step(3, STEP)
    rows = _rows(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[1]["train/lm_loss"] == 6.8
    assert rows[1]["validation/lm_loss"] == 6.0


def test_without_log_dir_nothing_is_written_and_it_is_said(
    make_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    _train(make_config(), [1, 2])
    assert list(tmp_path.iterdir()) == []
    assert "log_dir is not set: no metrics.jsonl is written" in capsys.readouterr().out


def test_a_log_dir_that_cannot_be_made_costs_one_warning(make_config, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    _train(make_config(log_dir=str(tmp_path / "file")), [1, 2])
    printed = capsys.readouterr()
    assert printed.err.count("warning: metrics.jsonl is left out") == 1
    assert "iteration        2/" in printed.out


def test_other_ranks_write_nothing(make_config, tmp_path):
    _train(make_config(log_dir=str(tmp_path / "logs")), [1, 2], rank=1, dp=2)
    assert list(tmp_path.iterdir()) == []


def test_flops_per_device_and_utilization(make_config, tmp_path):
    changes = {"peak_theoretical_tflops": 0.05, "checkpoint_activations": True}
    _train(make_config(log_dir=str(tmp_path), **changes), [1, 2], dp=2)
    row = _rows(tmp_path)[1]
    b, s, n, h, v = 8, 128, 4, 128, 1152
    attention_and_mlp = n * (24 * b * s * h**2 + 4 * b * s**2 * h)  # one forward pass
    head = 2 * b * s * h * v
    hardware = (4 * attention_and_mlp + 3 * head) / 0.25 / 2
    assert row["runtime/flops_per_sec_per_gpu"] == pytest.approx(hardware)
    assert row["runtime/hardware_flops_utilization"] == pytest.approx(100 * hardware / 0.05e12)
    assert row["runtime/model_flops_utilization"] == pytest.approx(75 * hardware / 0.05e12)
    assert flops_per_iteration(make_config(), 1152) == pytest.approx(0.75 * hardware * 0.25 * 2)


def test_a_saved_checkpoint_is_announced(make_config, capsys):
    with _run_log(make_config()) as run:
        run.checkpoint_saved(7, Path("checkpoints/global_step7"))
    assert "iteration 7 saved in checkpoints/global_step7" in capsys.readouterr().out


def test_the_parts_of_a_step_are_logged_as_means_of_the_interval(make_config, tmp_path, capsys):
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        for iteration, forward in ((1, 0.1), (2, 0.3)):
            timers = {"forward": forward, "batch generator": 0.001}
            run.train_step(iteration, dataclasses.replace(STEP, timers=timers))
    first, second = _rows(tmp_path)
    assert "timers/forward" not in first
    assert second["timers/forward"] == pytest.approx(0.2)
    assert "time (ms) | forward: 200.00 | batch generator: 1.00" in capsys.readouterr().out


def test_norms_join_every_iteration(make_config, tmp_path):
    norms = {"gradient_norms/2.mlp.linear1.weight": 0.25}
    with _run_log(make_config(log_dir=str(tmp_path))) as run:
        for iteration in (1, 2):
            run.train_step(iteration, dataclasses.replace(STEP, norms=norms))
    assert [row["gradient_norms/2.mlp.linear1.weight"] for row in _rows(tmp_path)] == [0.25, 0.25]


def test_memory_is_told_once(make_config, capsys):
    _train(make_config(), range(1, 7))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory (MB)" in line]
    found = re.fullmatch(
        r"after 2 iterations memory \(MB\) \| resident: ([\d.]+) \| max resident: ([\d.]+)", line
    )
    assert found and 50 < float(found[1]) <= float(found[2]) < 50_000


def test_a_run_that_starts_over_keeps_the_earlier_file(make_config, tmp_path, capsys):
    config = make_config(log_dir=str(tmp_path))
    _train(config, [1, 2])
    _train(config, [1])
    assert [row["iteration"] for row in _rows(tmp_path)] == [1]
    assert len((tmp_path / "metrics-1.jsonl").read_text().splitlines()) == 2
    assert "metrics.jsonl of an earlier run is kept as metrics-1.jsonl" in capsys.readouterr().out
