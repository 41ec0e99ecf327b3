"""A folder of checkpoints belongs to one run at a time, and to none once that has died."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neox.checkpoint.lock import saving_alone
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.world import World

SINGLE = ProcessGroups.single()
HOLDER = """
import sys
from pathlib import Path
from neox.checkpoint.lock import saving_alone
from neox.parallel.groups import ProcessGroups

with saving_alone(Path(sys.argv[1]), ProcessGroups.single()):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of `tmp_path` until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_is_there(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(CheckpointError) as caught, saving_alone(tmp_path, SINGLE):
        pass
    assert str(caught.value) == (
        f"save: another run is saving to {tmp_path} (pid {holder.pid} on {socket.gethostname()}). "
        "Wait for it, end it, or save to another folder."
    )


def test_the_lock_ends_with_the_run_that_held_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.communicate("")
    assert holder.returncode == 0
    with saving_alone(tmp_path, SINGLE):
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_a_killed_run_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with saving_alone(tmp_path, SINGLE):
        pass


def test_an_error_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), saving_alone(tmp_path, SINGLE):
        _ = 1 / 0
    with (
        saving_alone(tmp_path, SINGLE),
        pytest.raises(CheckpointError),
        saving_alone(tmp_path, SINGLE),
    ):
        pass


def test_folders_are_locked_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with saving_alone(tmp_path / "a", SINGLE), saving_alone(tmp_path / "b", SINGLE):
        pass


def test_a_file_system_without_locks_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with saving_alone(tmp_path, SINGLE):
        pass
    assert capsys.readouterr().err == (
        f"warning: save: {tmp_path / '.lock'} cannot be locked (No locks available): see to it "
        f"that no other run saves to {tmp_path} at the same time\n"
    )


def test_a_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"\.lock cannot be opened: Is a directory"),
        saving_alone(tmp_path, SINGLE),
    ):
        pass


def refused(rank: int, folder: str) -> str:
    groups = initialize(Topology(dp=2), "gloo", torch.device("cpu"))
    try:
        with saving_alone(Path(folder), groups):
            return "held"
    except CheckpointError as error:
        return str(error)


def test_every_rank_hears_of_it(world: World, tmp_path: Path) -> None:
    with saving_alone(tmp_path, SINGLE):
        first, second = world.run(2, refused, str(tmp_path))
        assert first == second and f"pid {os.getpid()}" in first
    assert world.run(2, refused, str(tmp_path)) == ["held", "held"]
