"""A run's processes on this host, as /proc shows them; nothing is found where there is no /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Container
from pathlib import Path

from neox.cluster.run_folder import RUN_FOLDER

KEEPER = "neox-keeper-"  # how its process's name begins
_DAEMONS = ("orted", "prted", "hydra_pmi_proxy")  # Open MPI's, and hydra's
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def of_run(folder: Path) -> list[int]:
    """The processes that have the run's folder in their environment or on their command line.

    A host may be a container that shares its process numbers with another: those with another host
    name's namespace are not looked at.
    """
    mark, word = f"{RUN_FOLDER}={folder}\0".encode(), f"\0{folder}\0".encode()
    found = []
    own = "/proc/self/ns/uts"
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marked = mark in (place / "environ").read_bytes()
            marked = marked or word in (place / "cmdline").read_bytes()
            if marked and os.readlink(place / "ns/uts") == os.readlink(own):
                found.append(int(place.name))
    return found


def kill_run(folder: Path, but: Container[int] = ()) -> None:
    """Kill at once every process of the run on this host, except `but` and keepers that run.

    Those are about to do the same: two that killed each other would leave the work undone.
    """
    for pid in of_run(folder):
        if pid not in but and not (_name(pid).startswith(KEEPER) and state(pid) != "T"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def kill_daemon(pid: int) -> None:
    """Kill process `pid` if it is an mpirun's on a host that is not mpirun's own.

    It would end with mpirun, but for a network that is cut or a SIGSTOP.
    """
    if _name(pid) in _DAEMONS:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def state(pid: int) -> str:
    """R running, S sleeping, D waiting for a device, T stopped, Z ended ...; "" if not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def name_process(name: str) -> None:
    """What ps and top call this process, on Linux (15 characters).

    Without a space: of a name that has one Slurm's proctrack/linuxproc cannot read /proc/PID/stat,
    and then it finds no process to send a signal to.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, also if it is stopped (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
