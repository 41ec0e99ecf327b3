"""Training whose processes are killed, stopped, hung or asked to stop: how it ends, and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.test_kill import make_run

DEEPY = Path(__file__).parents[2] / "deepy.py"
PATIENCE_S = 240.0  # for a busy machine


class Training:
    """deepy.py train.py in a folder; its processes are found by the folder of its run."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"),
        }
        self.process = subprocess.Popen(
            [sys.executable, DEEPY, "train.py", "model.yml", *arguments],
            cwd=folder,
            env=environment,
            stdout=(folder / "stdout").open("w"),
            stderr=(folder / "stderr").open("w"),
        )

    def wait_for(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.stdout) is not None)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stdout
            time.sleep(0.02)

    def end(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(seconds)

    def processes(self) -> dict[str, int]:
        """The run's processes that live, by their names: "neox-rank-0", "neox-keeper-0"."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder / "tmp").encode() in (place / "cmdline").read_bytes():
                    found[(place / "comm").read_text().strip()] = int(place.name)
            except OSError:
                continue
        return found

    def signal_rank(self, rank: int, number: signal.Signals) -> int:
        pid = self.processes()[f"neox-rank-{rank}"]
        os.kill(pid, number)
        return pid

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def losses(self) -> list[tuple[int, float]]:
        rows = map(json.loads, (self.folder / "logs/metrics.jsonl").read_text().splitlines())
        return [(row["iteration"], row["train/lm_loss"]) for row in rows]

    def assert_nothing_left(self) -> None:
        assert self.processes() == {}
        assert self.run_folders() == []

    def run_folders(self) -> list[Path]:
        return list((self.folder / "tmp").glob("neox-run-*"))


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """train(name, processes, iterations, *arguments) starts a run in a folder of that name."""
    runs = []

    def begin(name: str, processes: int, iterations: int, *arguments: str) -> Training:
        make_run(tmp_path / name, processes, iterations)
        runs.append(Training(tmp_path / name, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()
        for pid in run.processes().values():
            os.kill(pid, signal.SIGKILL)


LONG = 1_000_000


def test_a_rank_that_is_stopped_is_named_with_what_the_other_waits_in(
    train: Callable[..., Training],
) -> None:
    run = train("run", 2, LONG)
    run.wait_for(r"iteration +5/")
    stopped = time.monotonic()
    pid = run.signal_rank(1, signal.SIGSTOP)
    assert run.end() == 1
    assert time.monotonic() - stopped < 30
    assert re.match(rf"error: rank 1 \(pid {pid}\) is stopped since \d+ s\n", run.stderr)
    assert re.search(
        r"rank 0 waits in \w+ of (tp|all ranks) \([\d.]+ \w+\), call [\d,]+", run.stderr
    )
    assert "Traceback" not in run.stderr
    run.assert_nothing_left()


@pytest.mark.parametrize("who", ["keeper", "deepy"])
def test_whoever_is_killed_takes_all_with_it(train: Callable[..., Training], who: str) -> None:
    run = train("run", 2, LONG)
    run.wait_for(r"iteration +5/")
    if who == "deepy":
        run.process.kill()
        run.process.wait()
        deadline = time.monotonic() + 30
        while run.processes() or run.run_folders():
            assert time.monotonic() < deadline, (run.processes(), run.run_folders())
            time.sleep(0.05)
        return
    os.kill(run.processes()["neox-keeper-1"], signal.SIGKILL)
    assert run.end(30) == 137
    assert re.match(r"error: rank 1 \(pid \d+\) was killed, and its keeper with it", run.stderr)
    assert "Traceback" not in run.stderr
    run.assert_nothing_left()


def test_a_hang_is_told_by_its_stack(train: Callable[..., Training], tmp_path: Path) -> None:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HANG)
    os.environ["PYTHONPATH"] = str(folder)
    try:
        run = train("run", 2, LONG, "--set", "watchdog_timeout=15")
    finally:
        del os.environ["PYTHONPATH"]
    assert run.end() == 1
    assert re.match(r"error: rank 1 \(pid \d+\) has done nothing for \d+ s", run.stderr)
    assert re.search(
        r"rank 0 waits in \w+ of (?:tp|all ranks) .*call [\d,]+, since \d+ s", run.stderr
    )
    assert "what Python was doing there" in run.stderr and "in dream" in run.stderr
    assert "watchdog_timeout" in run.stderr
    run.assert_nothing_left()


# Rank 1 falls asleep in its fourth step. Before their first the ranks are seen to get on: how long
# a busy machine takes to start them is not what is tested.
HANG = """
import os, sys, threading

def dream():
    import neox.progress as progress
    begin, use = progress.begin_step, progress.use
    has_started = threading.Event()
    def get_on():
        seconds = 0
        while not has_started.wait(1):
            seconds += 1
            progress.do(f"starting for {seconds} s")
    def use_and_get_on(page):
        use(page)
        threading.Thread(target=get_on, daemon=True).start()
    def begin_step(iteration):
        has_started.set()
        begin(iteration)
        if iteration == 4 and os.environ.get("RANK") == "1":
            threading.Event().wait()
    begin_step.__code__ = begin_step.__code__.replace(co_name="dream")
    progress.begin_step, progress.use = begin_step, use_and_get_on

if any("worker.py" in word for word in sys.orig_argv):
    sys.path.insert(0, os.environ["PYTHONPATH"].split(os.pathsep)[0])
    dream()
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_training_after_a_step_with_a_checkpoint(
    train: Callable[..., Training], processes: int, number: signal.Signals
) -> None:
    run = train("run", processes, LONG, "--set", "checkpoint_factor=1000000", "--restarts", "1")
    run.wait_for(r"iteration +5/")
    run.process.send_signal(number)
    assert run.end() == 0, run.stderr
    assert run.stderr == ""
    saved = re.findall(r"checkpoint of iteration (\d+) saved", run.stdout)
    last = re.findall(r"\| iteration +(\d+)/", run.stdout)[-1]
    assert saved == [last]
    assert run.stdout.endswith(f"stopped after iteration {last}, as {number.name} asked\n")
    run.assert_nothing_left()


def test_a_restarted_run_has_the_losses_of_an_undisturbed_one(
    train: Callable[..., Training],
) -> None:
    whole = train("whole", 2, 40)
    assert whole.end() == 0
    run = train("run", 2, 40, "--restarts", "1")
    run.wait_for(r"checkpoint of iteration 9 saved")
    pid = run.signal_rank(1, signal.SIGKILL)
    assert run.end() == 0, run.stderr
    assert re.search(
        rf"restart 1 of 1, from global_step\d+: rank 1 \(pid {pid}\) was killed", run.stdout
    )
    assert run.losses() == whole.losses()
    run.assert_nothing_left()


def test_what_fails_twice_at_one_iteration_is_not_restarted_again(
    train: Callable[..., Training], tmp_path: Path
) -> None:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HANG.replace("threading.Event().wait()", "1 / 0"))
    os.environ["PYTHONPATH"] = str(folder)
    try:
        run = train("run", 2, 40, "--restarts", "5")
    finally:
        del os.environ["PYTHONPATH"]
    assert run.end() == 1
    assert run.stdout.count("restart 1 of 5") == 1 and "restart 2" not in run.stdout
    assert run.stderr.count("ZeroDivisionError: division by zero\n") == 2
    assert run.stderr.endswith("it would fail there again, and is not restarted\n")
    assert "failed in iteration 4 twice, with no checkpoint saved between" in run.stderr
    run.assert_nothing_left()


def test_restarts_need_checkpoints(train: Callable[..., Training]) -> None:
    run = train("run", 1, 40, "--restarts", "1", "--set", "save=null")
    assert run.end() == 2
    assert "restarts is 1, but save is missing" in run.stderr
