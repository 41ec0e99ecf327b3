"""A directory of checkpoints: each is written aside and renamed, then `latest` names it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from neox.atomic import write_text
from neox.checkpoint.neox import step_folder
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups

_UNFINISHED = ".unfinished"


def check_writable(directory: Path) -> None:
    """Make `directory` and write in it, so that a run learns now and not hours later if it can't.

    Not collective. Raises CheckpointError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(
            f"save: checkpoints cannot be written to {directory}: {error.strerror or error}."
        ) from error


def write_checkpoint(
    directory: Path,
    iteration: int,
    write: Callable[[Path], None],
    configs: Mapping[str, str],
    groups: ProcessGroups,
) -> Path:
    """Have every rank `write` its files into a folder aside, then put it in place whole.

    `configs` are the configuration's files by name, kept under configs/ as upstream does. A crash
    at any point leaves the earlier checkpoints and `latest` as they were. Collective over the
    world; the directory is shared by all ranks. Raises CheckpointError when it can't be written.
    """
    final = step_folder(directory, iteration)
    aside = directory / _UNFINISHED / final.name
    try:
        if groups.rank == 0:
            shutil.rmtree(aside.parent, ignore_errors=True)
            (aside / "configs").mkdir(parents=True)
            for name, text in configs.items():
                (aside / "configs" / Path(name).name).write_text(text, encoding="utf-8")
        groups.barrier()
        write(aside)
        groups.barrier()
        if groups.rank == 0:
            _sync(aside)
            if final.exists():  # a repeated step: the old folder goes once the new one is ready
                final.rename(directory / _UNFINISHED / f"{final.name}.replaced")
            aside.rename(final)
            write_text(directory / "latest", f"{final.name}")
            shutil.rmtree(aside.parent)
        groups.barrier()
    except OSError as error:
        raise CheckpointError(
            f"save: the checkpoint of iteration {iteration} could not be written to {directory}: "
            f"{error.strerror or error}. Earlier checkpoints are untouched."
        ) from error
    return final


def keep_last(directory: Path, count: int, groups: ProcessGroups) -> None:
    """Delete all but `count` checkpoints: the one just written, and the highest steps besides it.

    The one just written is not the highest where a run went back to an earlier step. Rank 0
    deletes; not collective.
    """
    if groups.rank != 0:
        return
    latest = (directory / "latest").read_text(encoding="utf-8")
    steps = sorted(
        (path.name == latest, int(match[1]), path)
        for path in directory.iterdir()
        if (match := re.match(r"global_step(\d+)$", path.name))
    )
    for *_, path in steps[:-count]:
        shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Flush every file under `folder`, and the folders themselves, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
