"""train.py killed at random moments or out of space: it goes on from its last finished save.

NEOX_KILLS=100 kills it a hundred times, which takes some twenty minutes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE
from tests.scripts import Script
from tests.small_disk import small_disk, small_files
from tests.world import World

DEEPY = Path(__file__).parents[2] / "deepy.py"
KILLS = int(os.environ.get("NEOX_KILLS", "6"))
MOST = 20  # iterations between two kills, on average at most
EVERY = 3  # iterations between two saves


class Life:
    """A run of train.py, read line by line until it ends or is killed."""

    def __init__(self, folder: Path, *arguments: str, world: World | None = None) -> None:
        """With `world` it starts at once, without it as a user's."""
        command = [str(DEEPY), "train.py", "model.yml", *arguments]
        self.process: Script | subprocess.Popen[str]
        if world is not None:
            self.process = Script(world, command, folder, folder / "stderr")
        else:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=(folder / "stderr").open("a"),
                text=True,
            )
        self.start: int | None = None  # the iteration that it went on from
        self.at = 0  # the last finished iteration
        self.saved = 0  # the last one whose checkpoint it called saved

    def read(self, iterations: int | None = None) -> None:
        """Until it has done so many, or to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "starting from fresh weights" in line:
                self.start = 0
            elif found := re.match(r"resuming \S+ at iteration (\d+)", line):
                self.start = int(found[1])
            elif found := re.search(r"\| iteration +(\d+)/", line):
                self.at = int(found[1])
            elif found := re.match(r"checkpoint of iteration (\d+) saved", line):
                self.saved = int(found[1])
            if iterations is not None and self.at and self.at >= (self.start or 0) + iterations:
                return

    def kill(self) -> None:
        self.process.kill()
        self.read()
        self.process.wait()


def make_run(folder: Path, processes: int, iterations: int) -> None:
    values = BASE | {
        "model_parallel_size": processes,
        "train_iters": iterations,
        "lr_decay_iters": iterations,
        "hidden_dropout": 0.1,
        "checkpoint_factor": EVERY,
        "keep_last_n_checkpoints": 2,
        "save": "checkpoints",
        "load": "checkpoints",
        "data_path": "data",
        "tokenizer_type": "HFTokenizer",
        "vocab_file": "tokenizer.json",
        "split": "1,0,0",
        "eval_iters": 0,
        "log_interval": 1,
        "log_dir": "logs",
    }
    folder.mkdir()
    (folder / "model.yml").write_text(json.dumps(values))
    small_tokenizer.write(folder)
    write_dataset(folder / "data", [40] * 30, modulo=280)


def finish(world: World, folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """Let a run come to its end; its weights and its losses."""
    life = Life(folder, world=world)
    life.read()
    assert life.process.wait() == 0, (folder / "stderr").read_text()
    step = folder / "checkpoints" / (folder / "checkpoints/latest").read_text()
    weights = {
        f"{path.name} {name}": tensor
        for path in step.glob("layer_*")
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    rows = map(json.loads, (folder / "logs/metrics.jsonl").read_text().splitlines())
    return weights, [(row["iteration"], row["train/lm_loss"]) for row in rows]


@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS), (2, KILLS // 3)])
def test_a_killed_run_loses_nothing_that_was_saved(
    world: World, tmp_path: Path, processes: int, kills: int
) -> None:
    iterations = MOST * kills + 10
    killed = tmp_path / "killed"
    make_run(killed, processes, iterations)
    draw = random.Random(kills)
    saved = reached = 0
    for number in range(kills):
        life = Life(killed, world=world)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 3))  # while it starts, or a little later
        else:
            life.read(draw.randrange(1, MOST - 2))
            time.sleep(draw.uniform(0, 0.1))  # a step and a save together take about that long
        life.kill()
        if life.start is not None:
            assert saved <= life.start <= reached, (number, saved, life.start, reached)
            assert life.start % EVERY == 0 or life.start == iterations
            saved, reached = max(saved, life.saved), max(reached, life.at)
    whole = tmp_path / "whole"
    make_run(whole, processes, iterations)
    weights, losses = finish(world, killed)
    expected_weights, expected_losses = finish(world, whole)
    assert losses == expected_losses
    assert [iteration for iteration, _ in losses] == list(range(1, iterations + 1))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert "damaged" not in (killed / "stderr").read_text()
    left = {path.name for path in (killed / "checkpoints").iterdir()}
    assert len(left) == 4 and left >= {".lock", "latest", f"global_step{iterations}"}, left


def test_a_full_disk_is_an_error_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, 2, 2 * EVERY)
    first = Life(folder, "--set", f"exit_interval={EVERY}")
    first.read()
    assert first.process.wait() == 0
    files = [path.stat().st_size for path in (folder / "checkpoints").rglob("*.pt")]
    with small_disk(folder / "disk", int(1.7 * sum(files))) as is_small:
        place = folder / "disk/checkpoints"
        shutil.copytree(folder / "checkpoints", place)
        with small_files(None if is_small else max(files) - 1):  # the children inherit it
            second = Life(folder, "--set", f"save={place}", "--set", f"load={place}")
        second.read()
        assert second.process.wait() == 2
        assert second.start == EVERY
    (line,) = (folder / "stderr").read_text().splitlines()
    assert line.startswith(f"error: save: the checkpoint of iteration {2 * EVERY} could not be ")
    assert line.endswith(f"the newest is {place}/global_step{EVERY}.")
