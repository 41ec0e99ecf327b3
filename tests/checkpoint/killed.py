"""Saving runs to be killed: `python -m tests.checkpoint.killed MODE FOLDER ...`, JSON on stdout.

A process that has imported torch forks a run, kills it, and forks a look at what is left, each in
milliseconds. A run resumes, "trains" and saves as train.py does, but its weights are all one number
that tells the step and the run that wrote them, so that a mixture of two saves shows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neox.checkpoint.directory import keep_last, recover, steps, write_checkpoint
from neox.checkpoint.neox import save_layers
from neox.checkpoint.verify import verify
from neox.config.architecture import architecture
from neox.model.gpt import LocalLayers
from neox.parallel.groups import ProcessGroups
from neox.train.start import find_start
from tests.models import VOCAB, built, config_of, random_weights

SINGLE = ProcessGroups.single()
KEPT = 3
BEGUN = "begun"


def model() -> LocalLayers:
    return built(config_of(), random_weights(config_of()), SINGLE)


def parameters(stage: LocalLayers) -> list[torch.Tensor]:
    modules = [module for layer, module in stage if layer.has_file]
    return [parameter.detach() for module in modules for parameter in module.parameters()]


def save(directory: Path, stage: LocalLayers, iteration: int, run: int) -> None:
    for parameter in parameters(stage):
        parameter.fill_(iteration * 1000 + run)
    write_checkpoint(
        directory,
        iteration,
        lambda folder: save_layers(folder, stage, SINGLE),
        {"a.yml": "{}"},
        SINGLE,
        grid={"tp": 1, "pp": 1, "dp": 1},
        padded_vocab_size=VOCAB,
        architecture=architecture(config_of()),
    )


def look(directory: Path) -> dict[str, Any]:
    """Recover and resume as train.py does; the step, and the run that wrote it."""
    recover(directory, SINGLE)
    start = find_start(
        config_of(load=str(directory), save=str(directory), extra_save_iters=[1]), SINGLE
    )
    if start.checkpoint is None:
        return {"iteration": 0, "run": None}
    stage = model()
    for layer, module in stage:
        if layer.has_file:
            start.checkpoint.load_into(module, layer, SINGLE)
    (value,) = {value for parameter in parameters(stage) for value in parameter.unique().tolist()}
    assert value // 1000 == start.iteration, (value, start.iteration)
    return {"iteration": start.iteration, "run": int(value % 1000)}


def in_fork(act: Callable[[], Any]) -> tuple[int, int]:
    """Start `act` in a process of its own; its pid and the reading end of its pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 1)
        try:
            print("\n" + json.dumps(act()), flush=True)
        except BaseException as error:
            print(f"\n{json.dumps(repr(error))}", flush=True)
        os._exit(0)
    os.close(writing)
    return pid, reading


def result(pid: int, reading: int) -> Any:
    """What `act` returned, or the repr of its exception; None if it was killed."""
    with open(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else json.loads(lines[-1])


def say(journal: Path, **fact: Any) -> None:
    with open(journal, "a") as file:
        file.write(json.dumps(fact) + "\n")


def state(directory: Path) -> dict[str, Any]:
    """What a kill left, and then what a run makes of it."""
    return {
        "left": sorted(path.name for path in directory.iterdir()),
        "partial": [folder.name for folder in steps(directory) if verify(folder)],
        "found": result(*in_fork(lambda: look(directory))),
        "after": sorted(path.name for path in directory.iterdir()),
    }


# Kills at any time


def live(directory: Path, journal: Path, run: int, back: bool) -> None:
    """A run that saves for ever; with `back` from the oldest step that is there."""
    stage = model()
    iteration = look(directory)["iteration"]
    if back and (found := steps(directory)):
        iteration = int(found[-1].name.removeprefix("global_step"))
    os.write(1, f"{BEGUN}\n".encode())
    while True:
        iteration += 1
        note(journal, saving=iteration, run=run)
        save(directory, stage, iteration, run)
        note(journal, saved=iteration, run=run)
        keep_last(directory, KEPT, SINGLE)


def wait_for_begin(reading: int) -> None:
    with open(reading, closefd=False) as pipe:
        for line in pipe:
            if line.strip() == BEGUN:
                return
    raise AssertionError("the run ended before it began")


def note(journal: Path, **fact: int) -> None:
    with open(journal, "a") as file:
        file.write(json.dumps(fact) + "\n")


def kill_at_random(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """For each kill: the run's last finished save, the one under way, and the `state`."""
    draw = random.Random(seed)
    directory, journal = folder / "checkpoints", folder / "journal"
    directory.mkdir()
    journal.touch()
    found = []
    for run in range(1, kills + 1):
        back = draw.random() < 0.3
        pid, reading = in_fork(lambda run=run, back=back: live(directory, journal, run, back))
        if draw.random() < 0.8:  # else it may be killed while it resumes
            wait_for_begin(reading)
        time.sleep(draw.uniform(0, 0.1))  # a save takes some 0.02 s
        os.kill(pid, signal.SIGKILL)
        end = result(pid, reading)
        assert end is None, f"run {run} ended by itself: {end}"
        facts = [json.loads(line) for line in journal.read_text().splitlines()]
        mine = [fact for fact in facts if fact["run"] == run]
        saved = [fact["saved"] for fact in mine if "saved" in fact]
        under_way = [fact["saving"] for fact in mine[-1:] if "saving" in fact]
        found.append({"saved": saved[-1:], "under_way": under_way} | state(directory))
    return found


# Kills at every operation of the file system


def die_at(operation: int) -> None:
    """Have this process killed when it begins its `operation`-th operation of the file system."""
    count = 0

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.")):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def prepare(directory: Path, stage: LocalLayers, act: str) -> None:
    """Steps 4 and 6, of run 1; for "recover" with what kills may have left."""
    for step in (4, 6):
        save(directory, stage, step, 1)
    if act == "recover":
        unfinished = directory / ".unfinished"
        save(unfinished, stage, 2, 1)
        (unfinished / "global_step2").rename(unfinished / "global_step2.deleted")
        (directory / "global_step6").rename(unfinished / "global_step6.replaced")
        save(unfinished, stage, 6, 2)


def kill_at_each(folder: Path, act: str) -> list[dict[str, Any]]:
    """After a kill at each operation of `act`, a step to save or "recover": the `state`.

    The last is that of no kill.
    """
    start, directory = folder / "start", folder / "checkpoints"
    stage = model()
    prepare(start, stage, act)
    found: list[dict[str, Any]] = []

    def run() -> str:
        die_at(len(found) + 1)
        if act == "recover":
            recover(directory, SINGLE)
        else:
            save(directory, stage, int(act), 2)
            keep_last(directory, 2, SINGLE)
        return "done"

    while True:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(start, directory)
        end = result(*in_fork(run))
        found.append({"end": end} | state(directory))
        if end is not None:
            return found


def main() -> None:
    # No threads, which do not survive a fork, and no lock that processes share: a kill keeps it.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    mode, folder, *rest = sys.argv[1:]
    if mode == "random":
        found = kill_at_random(Path(folder), *map(int, rest))
    else:
        found = kill_at_each(Path(folder), *rest)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
