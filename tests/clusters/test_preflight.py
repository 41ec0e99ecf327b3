"""Hosts that cannot take part are named within seconds, in one message."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import neox.errors
from tests.clusters.cluster import Cluster
from tests.clusters.model import DEEPY, PYTHON, write_folder

SECONDS = 60.0  # on a machine that does much else; alone it takes six


@pytest.fixture(scope="module")
def folder(cluster: Cluster) -> Path:
    folder = cluster.folder / "preflight"
    write_folder(folder)
    (folder / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    return folder


def refusal(cluster: Cluster, folder: Path, *arguments: str) -> list[str]:
    """The lines of the error of a run from alpha that is refused, in time."""
    command = [PYTHON, DEEPY, "train.py", "model.yml", "-H", "hosts", *arguments]
    began = time.monotonic()
    done = cluster["alpha"].run(command, cwd=folder, timeout=280)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert time.monotonic() - began < SECONDS
    assert not list(folder.glob("neox-run-*"))
    return [line.strip() for line in done.stderr.splitlines()]


def test_a_host_that_cannot_be_reached(cluster: Cluster, folder: Path) -> None:
    cluster.cut("beta")
    try:
        lines = refusal(cluster, folder)
    finally:
        cluster.restore("beta")
    assert lines[0] == "error: not every host can run this:"
    assert lines[1].startswith("beta: ssh does not get there: ssh: connect to host beta port 22")
    assert lines[2].startswith("try: ssh HOST true") and len(lines) == 3


def test_a_folder_that_other_hosts_lack(cluster: Cluster, folder: Path) -> None:
    own = Path("/tmp/own")  # each host has its own /tmp
    cluster["alpha"].run(["cp", "-r", folder, own], check=True)
    assert "beta has no folder /tmp/own: start the run in a folder" in refusal(cluster, own)[1]
    cluster["beta"].run(["mkdir", own], check=True)
    assert "beta has another folder /tmp/own than this host" in refusal(cluster, own)[1]


def test_a_python_that_is_not_there(cluster: Cluster, folder: Path) -> None:
    programs = PYTHON.parent.resolve()
    cluster["beta"].mount_disk(programs, 1 << 20)
    try:
        lines = refusal(cluster, folder)
    finally:
        cluster["beta"].unmount_disk(programs)
    assert lines[1].startswith(f"beta has no {PYTHON}: make the virtual environment on a file")


def test_hosts_with_other_code(cluster: Cluster, folder: Path) -> None:
    module = Path(neox.errors.__file__)
    (folder / "errors.py").write_text(module.read_text() + "# changed\n")
    cluster["beta"].run(["mount", "--bind", folder / "errors.py", module], check=True)
    try:
        lines = refusal(cluster, folder, "--set", "launcher=slurm")
    finally:
        cluster["beta"].unmount_disk(module)
    assert lines[0] == "error: the hosts do not run the same thing:"
    assert lines[1].startswith("neox's own code (a hash of it): ")
    assert lines[1].count(" on alpha; ") == 1 and lines[1].endswith(" on beta")
