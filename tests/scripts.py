"""Scripts that start at once: run as `python script ...` would, with the libraries imported before.

For tests of what a script does. What it needs to start, how fast and how quietly it does, takes a
process of its own; so do several processes, which a script starts by itself.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from tests.world import World

PATIENCE_S = 300.0  # for a process to end on a busy machine; nothing is measured with it


class Script:
    """A running script, with what tests need of subprocess.Popen."""

    def __init__(
        self,
        world: World,
        command: Sequence[str | Path],
        cwd: Path,
        stderr: Path,
        cores: int | None = None,
    ) -> None:
        """Start `command`, a script and its arguments, in `cwd`, on so many cores or all.

        It has our environment, as it is now, without GPUs. `stderr` is appended to, `stdout` read.
        """
        read, write = os.pipe()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with stderr.open("ab") as file:
            self._process = world.context.Process(
                target=_run,
                args=(list(map(str, command)), str(cwd), environment, cores),
                kwargs={"stdout": _Descriptor(write), "stderr": _Descriptor(file.fileno())},
                daemon=True,  # if its test fails, it ends with us
            )
            self._process.start()
        os.close(write)
        self.stdout = os.fdopen(read)

    def poll(self) -> int | None:
        """The exit status, -n after signal n, once it has ended."""
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join(PATIENCE_S)
        status = self.poll()
        if status is None:
            self.kill()
            raise AssertionError(f"not done after {PATIENCE_S:g} s")
        return status

    def kill(self) -> None:
        self._process.kill()


def run(
    world: World, *command: str | Path, cwd: Path, cores: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; see Script."""
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        script = Script(world, command, cwd, stderr, cores)
        stdout = script.stdout.read()
        return subprocess.CompletedProcess(command, script.wait(), stdout, stderr.read_text())


class _Descriptor:
    """An open file on its way to a process that is being started."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self._number),)


def _detach(passed: Any) -> int:
    return passed.detach()


def _run(
    command: list[str],
    cwd: str,
    environment: dict[str, str],
    cores: int | None,
    *,
    stdout: int,
    stderr: int,
) -> None:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
