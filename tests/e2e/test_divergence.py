"""train.py ends at a NaN: on all ranks, with one line and status 2, and saves nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_kill import Life, make_run
from tests.world import World


@pytest.mark.parametrize("grid", [{"pipe_parallel_size": 0}, {"pipe_parallel_size": 2}])
def test_a_run_ends_at_its_first_nan(world: World, tmp_path: Path, grid: dict[str, int]) -> None:
    folder = tmp_path / "run"
    make_run(folder, 1, 20)
    path = folder / "model.yml"
    values = json.loads(path.read_text()) | grid | {"checkpoint_factor": 1, "hidden_dropout": 0.0}
    values["exit_interval"] = 1
    path.write_text(json.dumps(values))
    first = Life(folder, world=world)
    first.read()
    assert first.process.wait() == 0
    rates = {"exit_interval": None, "min_lr": 1e20}
    rates["optimizer"] = {"type": "Adam", "params": {"lr": 1e20, "betas": [0.9, 0.95]}}
    path.write_text(json.dumps(values | rates))
    second = Life(folder, world=world)
    second.read()
    assert second.process.wait() == 2
    assert (second.start, second.saved) == (1, 2)  # the step to 1e20 itself is finite
    stderr = (folder / "stderr").read_text()
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: iteration 3: the loss is nan. The first ")
    assert "in the output of 2." in error
    assert "data document " in error
    assert "the last checkpoint, checkpoints/global_step2." in error
    assert "Traceback" not in stderr
    assert sorted(p.name for p in (folder / "checkpoints").glob("global_step*")) == [
        "global_step1",
        "global_step2",
    ]
