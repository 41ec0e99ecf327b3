"""deepy.py with real processes: what comes out, how it ends, and that nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEEPY = REPOSITORY / "deepy.py"
PATIENCE_S = 180.0  # for processes to come up on a busy machine; nothing is measured with it

MODEL = """
{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16,
 "max_position_embeddings": 16, "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
"""

# A rank writes its pid into a file of its own when it is up, then does what its test is about.
SCRIPT = """
import os, sys, signal, time
from pathlib import Path
from neox.config import NeoXConfig
from neox.errors import ConfigError

config = NeoXConfig.decode(Path(os.environ["NEOX_CONFIG_FILE"]).read_text())
rank = int(os.environ["RANK"])
behaviour = os.environ["BEHAVIOUR"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {config.num_layers} layers")
print(f"a word to stderr from {rank}", file=sys.stderr)
if behaviour == "collective":
    import torch.distributed as dist
    dist.init_process_group("gloo")
Path(f"up_{rank}.part").write_text(str(os.getpid()))
os.rename(f"up_{rank}.part", f"up_{rank}")
if behaviour == "refuse":
    # The job ends with the first refusal: every rank is to have spoken by then.
    while not all(Path(f"up_{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
    raise ConfigError(f"num_layers is {config.num_layers}")
if behaviour == "raise" and rank == 2:
    raise ValueError("unforeseen")
if behaviour == "exit":
    sys.exit(3)
if behaviour == "collective":
    if rank != 3:
        dist.barrier()
if behaviour != "end":
    signal.pause()
"""


@dataclass
class Run:
    """A running deepy.py; every process it starts carries the run's mark in its environment."""

    process: subprocess.Popen[str]
    folder: Path
    mark: str

    def wait_for_ranks(self, n: int) -> list[int]:
        files = [self.folder / f"up_{rank}" for rank in range(n)]
        wait_until(lambda: all(file.exists() for file in files) or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, stdout, stderr

    def left(self) -> dict[int, str]:
        """The run's processes that live, with their command lines."""
        found = {}
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environment.read_bytes():
                    line = environment.with_name("cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(environment.parent.name)] = line.decode()
            except OSError:
                continue
        return found

    def pid_of(self, word: str) -> int:
        (pid,) = [pid for pid, line in self.left().items() if word in line]
        return pid


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """start(behaviour, processes) runs SCRIPT through deepy.py in a folder of its own."""
    runs = []

    def begin(behaviour: str, processes: int = 4) -> Run:
        (tmp_path / "model.yml").write_text(MODEL + f'"num_gpus": {processes}}}')
        (tmp_path / "script.py").write_text(SCRIPT)
        (tmp_path / "tmp").mkdir()
        mark = uuid.uuid4().hex
        environment = {
            **os.environ,
            "BEHAVIOUR": behaviour,
            "TEST_MARK": mark,
            "TMPDIR": str(tmp_path / "tmp"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        process = subprocess.Popen(
            [sys.executable, DEEPY, "script.py", "model.yml"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs.append(Run(process, tmp_path, mark))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.left():
            os.kill(pid, signal.SIGKILL)


def assert_nothing_left(run: Run) -> None:
    assert run.left() == {}
    assert list((run.folder / "tmp").iterdir()) == [], "the run's folder stays behind"


def test_four_ranks_speak_with_one_voice(start: Callable[..., Run]) -> None:
    run = start("end")
    status, stdout, stderr = run.end()
    assert (status, stderr) == (0, "a word to stderr from 0\n")
    assert stdout == (
        "no CUDA device: 4 processes on the CPU, gloo instead of nccl\nrank 0 of 4: 2 layers\n"
    )
    assert_nothing_left(run)


def test_one_process_runs_in_place(start: Callable[..., Run]) -> None:
    run = start("exit", processes=1)
    status, stdout, _ = run.end()
    assert (status, stdout) == (3, "rank 0 of 1: 2 layers\n")
    assert int((run.folder / "up_0").read_text()) == run.process.pid
    assert_nothing_left(run)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_users_error_is_one_line(start: Callable[..., Run], processes: int) -> None:
    run = start("refuse", processes)
    status, _, stderr = run.end()
    assert status == 2
    assert stderr == "a word to stderr from 0\nerror: num_layers is 2\n"
    assert_nothing_left(run)


def test_an_internal_error_shows_one_traceback(start: Callable[..., Run]) -> None:
    run = start("raise")
    status, _, stderr = run.end()
    assert status == 1
    assert "rank 2 of 4 failed:\nTraceback" in stderr and stderr.endswith(
        "ValueError: unforeseen\n"
    )
    assert stderr.count("Traceback") == 1
    assert_nothing_left(run)


def test_a_killed_rank_is_named_and_ends_the_job(start: Callable[..., Run]) -> None:
    run = start("collective")
    pid = run.wait_for_ranks(4)[2]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    status, _, stderr = run.end()
    assert time.monotonic() - killed < 10
    assert status == 128 + 9
    assert re.search(rf"error: rank 2 \(pid {pid}\) was killed by signal 9 \(SIGKILL\)", stderr)
    assert "Traceback" not in stderr and "memory" in stderr
    assert_nothing_left(run)


def test_a_killed_launcher_is_a_failure(start: Callable[..., Run]) -> None:
    run = start("wait")
    run.wait_for_ranks(4)
    os.kill(run.pid_of("deepspeed.launcher"), signal.SIGKILL)
    status, _, stderr = run.end()
    assert status == 128 + 9
    assert "launcher was killed by signal 9" in stderr and "not yet done: 0, 1, 2, 3" in stderr
    assert_nothing_left(run)


@pytest.mark.parametrize(
    ("number", "behaviour"), [(signal.SIGINT, "collective"), (signal.SIGTERM, "wait")]
)
def test_a_stopped_job_leaves_nothing(
    start: Callable[..., Run], number: signal.Signals, behaviour: str
) -> None:
    run = start(behaviour)
    run.wait_for_ranks(4)
    asked = time.monotonic()
    run.process.send_signal(number)
    status, _, stderr = run.end()
    assert time.monotonic() - asked < 10
    assert status == 128 + number
    assert "Traceback" not in stderr
    assert_nothing_left(run)


def test_a_stopped_process_in_place_says_so(start: Callable[..., Run]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        run = start("wait", processes=1)
        run.wait_for_ranks(1)
        run.process.send_signal(number)
        status, _, stderr = run.end()
        assert (status, "Traceback" in stderr) == (128 + number, False)
        assert_nothing_left(run)
        (run.folder / "tmp").rmdir()
        (run.folder / "up_0").unlink()


def test_ranks_do_not_outlive_a_killed_deepy(start: Callable[..., Run]) -> None:
    run = start("wait")
    run.wait_for_ranks(4)
    run.process.kill()
    run.process.wait()
    wait_until(lambda: run.left() == {}, 10)
    assert list((run.folder / "tmp").iterdir()) == []
