"""The parts of the console's lines that come and go, and its units."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

from neox import log
from neox.train import console

VALUES = {
    "iteration": 7,
    "train_iters": 20,
    "samples_per_second": 12.4611,
    "seconds_per_iteration": 0.642,
    "learning_rate": 5e-4,
    "flops_per_second": 9.84e9,
    "utilization": None,
    "losses": {"lm_loss": 7.20436},
    "loss_scale": None,
    "skipped": 0,
    "nan": 0,
}


def test_plain_line():
    assert console.training_line(**VALUES) == (
        " samples/sec: 12.461 | iteration        7/      20 |"
        " elapsed time per iteration (ms): 642.0 | learning rate: 5.000E-04 |"
        " approx flops per GPU: 9.8GFLOPS | lm_loss: 7.204360E+00 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_utilization_follows_the_flops_and_loss_scale_the_losses():
    changes = {
        "utilization": (30.0, 40.0),
        "loss_scale": 65536.0,
        "losses": {"lm_loss": 2.0, "kl": 0.5},
        "skipped": 2,
        "nan": 1,
    }
    line = console.training_line(**(VALUES | changes))
    assert "9.8GFLOPS | MFU: 30.00% | HFU: 40.00% | lm_loss: 2.000000E+00 | kl: 5.0" in line
    assert "| loss scale: 65536.0 | number of skipped iterations:   2 |" in line
    assert line.endswith("| number of nan iterations:   1 |")


@pytest.mark.parametrize(
    ("flops", "text"),
    [(12, "12.0"), (1.5e3, "1.5KFLOPS"), (2e14, "200.0TFLOPS"), (5e24, "5000.0ZFLOPS")],
)
def test_human_flops(flops, text):
    assert console.human_flops(flops) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (600, "10m"), (7300, "2h"), (200000, "2d")]
)
def test_human_seconds(seconds, text):
    assert console.human_seconds(seconds) == text


def test_parts_of_a_step_and_memory():
    parts = {"forward": 0.01234, "batch generator": 0.5}
    assert console.timers_line(parts) == "time (ms) | forward: 12.34 | batch generator: 500.00"
    assert console.memory_line(10, {"allocated": 1.5, "max allocated": 1024.0}) == (
        "after 10 iterations memory (MB) | allocated: 1.5 | max allocated: 1024.0"
    )


def test_the_live_line_is_for_terminals_with_or_without_a_size(monkeypatch, tmp_path):
    ours, terminal = os.openpty()  # of size 0 x 0, as a scheduler's
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with log.progress(total=4, desc="training") as bar:
            bar.set_postfix_str("loss 7.0", refresh=False)
            bar.update(1)
            bar.refresh()
    shown = b""
    with contextlib.suppress(OSError):  # which is how Linux ends a terminal without a writer
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert b"training:  25%" in shown and b"loss 7.0" in shown
    with (tmp_path / "file").open("w+") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with log.progress(total=4, desc="training") as bar:
            bar.update(1)
        assert stderr.tell() == 0
