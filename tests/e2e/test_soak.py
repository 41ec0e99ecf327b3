"""The soak's short form on a real run, and that its verdict tells growth from noise."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import LIMIT_MB, MB, Reading, judge

ROOT = Path(__file__).parents[2]


def test_training_keeps_nothing(tmp_path: Path) -> None:
    """No memory, files or threads, in 300 steps with everything that recurs in a run."""
    result = tmp_path / "verdict.json"
    soak = subprocess.run(
        [sys.executable, ROOT / "benchmarks/soak.py", "--quick", "--json", result],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    (run,) = json.loads(result.read_text())["runs"]
    assert run["steps"] == 300
    assert run["readings"] > 20


def readings(mb_per_1000_steps: float, *, files: float = 0, threads: float = 0) -> list[Reading]:
    """Every fourth of 6000 steps: a start that grows, activations that come and go, and growth."""
    draw = random.Random(1)
    return [
        Reading(
            step,
            int(MB * (300 + min(step, 1500) / 10 + mb_per_1000_steps * step / 1000))
            + int(MB * draw.choice([0, 0, 0, 4, 8, 12]) * draw.random()),
            20 + (draw.random() < 0.3) + int(files * step),
            10 + int(threads * step),
        )
        for step in range(4, 6001, 4)
    ]


@pytest.mark.parametrize("growth", [-0.3, 0.0, 0.2])
def test_what_comes_and_goes_is_flat(growth: float) -> None:
    verdict = judge("it", readings(growth))
    assert verdict.mb_per_1000_steps == pytest.approx(growth, abs=0.1)
    assert verdict.problems(LIMIT_MB) == []


def test_what_stays_is_found() -> None:
    (growing,) = judge("it", readings(1.5)).problems(LIMIT_MB)
    assert growing.startswith("it grows by 1.5") and growing.endswith("and may by 1")
    (files,) = judge("it", readings(0.0, files=1 / 1000)).problems(LIMIT_MB)
    assert files == "it keeps 2 more files open than before"
    (threads,) = judge("it", readings(0.0, threads=1 / 2000)).problems(LIMIT_MB)
    assert threads == "it has 1 more threads than before"
