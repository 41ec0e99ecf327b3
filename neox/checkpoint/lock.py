"""One training run at a time saves into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neox import log
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups

LOCK = ".lock"
_MOST = 200  # bytes that are read of who holds it


@contextmanager
def saving_alone(directory: Path, groups: ProcessGroups) -> Iterator[None]:
    """Hold {directory}/.lock for the block: rank 0 does, and writes there who it is.

    Two runs in one folder would clear away each other's unfinished saves and delete each other's
    checkpoints. The lock is the kernel's (flock), so it ends with its process however that ends;
    the file stays, and means nothing by itself. A file system without locks gets a warning.

    Collective over the world; `directory` is there. Raises CheckpointError, on every rank, when
    another run holds it.
    """
    handle, problem = _lock(directory / LOCK) if groups.rank == 0 else (None, None)
    try:
        problem = groups.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path) -> tuple[int | None, str | None]:
    """An open file, which holds the lock where there are locks, or what keeps this run from it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        return None, f"save: {path} cannot be opened: {error.strerror}."
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(handle, _MOST).decode(errors="replace").strip()
        os.close(handle)
        return None, (
            f"save: another run is saving to {path.parent}{f' ({who})' if who else ''}. Wait for "
            "it, end it, or save to another folder."
        )
    except OSError as error:
        log.warning(
            f"save: {path} cannot be locked ({error.strerror}): see to it that no other run saves "
            f"to {path.parent} at the same time"
        )
        return handle, None
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        os.truncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle, None
