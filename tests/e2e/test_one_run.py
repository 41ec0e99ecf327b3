"""train.py beside another run that saves to the same folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neox.checkpoint.lock import saving_alone
from neox.parallel.groups import ProcessGroups
from tests.config.runs import make_files, write

DEEPY = Path(__file__).parents[2] / "deepy.py"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_into_one_folder_is_refused_and_touches_nothing(
    processes: int, tmp_path: Path
) -> None:
    make_files(tmp_path)
    write(tmp_path / "model.yml", f"num_gpus: {processes}")
    save = tmp_path / "checkpoints"
    unfinished = save / ".unfinished" / "global_step150"
    unfinished.mkdir(parents=True)
    with saving_alone(save, ProcessGroups.single()):
        run = subprocess.run(
            [sys.executable, DEEPY, "train.py", "model.yml"],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 2
    assert run.stderr.startswith(
        f"error: save: another run is saving to checkpoints (pid {os.getpid()} on "
    )
    assert run.stderr.count("\n") == 1
    assert unfinished.is_dir()
