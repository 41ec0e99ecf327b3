"""kill -9 at any moment of a run that saves: the next one goes on from its last finished save."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def killed(*arguments: str | Path) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_100_kills_at_random_moments(tmp_path: Path) -> None:
    outcomes = killed("random", tmp_path, "100", "1")
    assert len(outcomes) == 100
    safe = {"iteration": 0, "run": None}
    for run, outcome in enumerate(outcomes, start=1):
        if outcome["saved"]:
            safe = {"iteration": outcome["saved"][0], "run": run}
        allowed = [safe] + [{"iteration": step, "run": run} for step in outcome["under_way"]]
        assert outcome["found"] in allowed, (run, outcome)
        safe = outcome["found"]
        assert outcome["partial"] == [], (run, outcome)
        assert ".unfinished" not in outcome["after"]
    assert sum(".unfinished" in outcome["left"] for outcome in outcomes) > 20


STEPS_4_AND_6 = ["global_step4", "global_step6", "latest"]


@pytest.mark.parametrize("saved", [8, 6])
def test_a_kill_at_each_operation_of_a_save(tmp_path: Path, saved: int) -> None:
    """Of a new step, and of one that is there already."""
    old, new = {"iteration": 6, "run": 1}, {"iteration": saved, "run": 2}
    outcomes = killed("each", tmp_path, str(saved))
    found = [outcome["found"] for outcome in outcomes]
    assert found == sorted(found, key=[old, new].index)  # the old one, from some kill on the new
    assert outcomes[-1]["end"] == "done" and outcomes[-1]["found"] == new
    assert min(found.count(old), found.count(new)) >= 10
    for outcome in outcomes:
        assert outcome["partial"] == [], outcome
        assert set(outcome["after"]) - {f"global_step{saved}"} <= set(STEPS_4_AND_6), outcome
        assert {"latest", "global_step6"} <= set(outcome["after"]), outcome


def test_a_kill_at_each_operation_of_a_recovery(tmp_path: Path) -> None:
    outcomes = killed("each", tmp_path, "recover")
    assert len(outcomes) > 20
    for outcome in outcomes:
        assert outcome["found"] == {"iteration": 6, "run": 1}, outcome
        assert outcome["after"] == STEPS_4_AND_6
        assert outcome["partial"] == [], outcome
