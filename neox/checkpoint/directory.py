"""A directory of checkpoints: each is written aside and renamed, then `latest` names it.

    latest                              the name of the one written last
    global_stepN/                       whole: written, listed in its manifest, flushed
    .unfinished/global_stepN/           being written
    .unfinished/global_stepN.replaced/  the same step of before, until the new one is in its place
    .unfinished/global_stepN.deleted/   pruned, being deleted

At every moment each step is here once, under its name or in .unfinished, and nothing under a step's
name is partial. What a killed run left in .unfinished is dealt with by the next run and save.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from neox import log
from neox.checkpoint.folders import step_folder
from neox.checkpoint.manifest import Entry, Hasher, Manifest
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups

UNFINISHED = ".unfinished"
_REPLACED = ".replaced"
_DELETED = ".deleted"

T = TypeVar("T")


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


def recover(directory: Path, groups: ProcessGroups) -> None:
    """Deal with what a killed run left in .unfinished: undo, or delete; say it in a line.

    For the directory that this run saves to, since another run may be at work in any other.
    Collective over the world. Raises CheckpointError.
    """

    def act() -> None:
        if groups.rank == 0:
            for line in _recover(directory):
                log.info(f"save: {line}")

    try:
        on_every_rank(groups, act)
    except FailedError as failed:
        raise CheckpointError(
            f"save: {directory / UNFINISHED}, the remains of an interrupted save, cannot be "
            f"cleared away: {failed}."
        ) from failed


def write_checkpoint(
    directory: Path,
    iteration: int,
    write: Callable[[Path], Mapping[str, Entry]],
    configs: Mapping[str, str],
    groups: ProcessGroups,
    *,
    grid: Mapping[str, int],
    padded_vocab_size: int,
    architecture: Mapping[str, Any],
) -> Path:
    """Have every rank `write` its files into a folder aside, then put it in place whole.

    `write` gets the folder and returns what it wrote, flushed to the disk, by file name; its
    OSErrors are dealt with here, and it must not wait for a rank that may have had one. `configs`
    are the configuration's files by name, kept under configs/ as upstream does. `grid` (tp, pp,
    dp), `padded_vocab_size` and `architecture` go into the manifest.

    A crash at any point leaves the earlier checkpoints and `latest` as they were. Collective over
    the world; the directory is shared by all ranks. When it can't be written, nothing of it stays
    behind and every rank raises the same CheckpointError.
    """
    final = step_folder(directory, iteration)
    aside = directory / UNFINISHED / final.name
    entries: dict[str, Entry] = {}

    def begin() -> None:
        if groups.rank == 0:
            _recover(directory)
            (aside / "configs").mkdir(parents=True)
            for name, text in configs.items():
                path = aside / "configs" / Path(name).name
                entries[f"configs/{path.name}"] = write_file(path, text.encode())

    def finish() -> None:
        if groups.rank == 0:
            manifest = Manifest(aside, iteration, grid, padded_vocab_size, architecture, entries)
            manifest.check_sizes()  # the other ranks' files: the directory has to be a shared one
            manifest.write()
            for folder in (aside / "configs", aside):
                _sync(folder)
            _put_in_place(aside, final)

    try:
        on_every_rank(groups, begin)
        for written in on_every_rank(groups, lambda: write(aside)):
            entries.update(written)
        on_every_rank(groups, finish)
    except FailedError as failed:
        if groups.rank == 0:
            _clear(directory)
        raise CheckpointError(
            f"save: the checkpoint of iteration {iteration} could not be written to {directory}: "
            f"{failed}. {_earlier(directory)}"
        ) from failed
    return final


def keep_last(directory: Path, count: int, groups: ProcessGroups) -> None:
    """Delete all but `count` checkpoints: the one just written, and the highest steps besides it.

    The one just written is not the highest where a run went back to an earlier step. One with
    files missing or of a wrong size does not count, and goes once `count` higher ones are whole.
    Rank 0 deletes; not collective.
    """
    if groups.rank != 0:
        return
    try:
        latest = (directory / "latest").read_text(encoding="utf-8")
        kept = 0
        for folder in sorted(steps(directory), key=lambda folder: folder.name != latest):
            if kept >= count:
                _delete(folder)
            elif has_its_files(folder):
                kept += 1
    except OSError as error:  # the new checkpoint is safe, so the run goes on
        log.warning(
            f"keep_last_n_checkpoints: old checkpoints in {directory} could not be deleted: "
            f"{_reason(error)}"
        )


class FailedError(CheckpointError):
    """What `on_every_rank` raises."""


def on_every_rank(groups: ProcessGroups, act: Callable[[], T]) -> list[T]:
    """Each rank's result, on every rank. What fails on a rank fails on all, with its reason.

    Collective over the world; `act` must not be. OSErrors and CheckpointErrors become a FailedError
    that tells the first of them.
    """
    result: T | None = None
    reason = None
    try:
        result = act()
    except OSError as error:
        reason = _reason(error)
    except CheckpointError as error:
        reason = str(error).rstrip(".")
    outcomes = groups.gather((result, reason, socket.gethostname()))
    reasons = {rank: why for rank, (_, why, _) in enumerate(outcomes) if why is not None}
    if reasons:
        first = next(iter(reasons.values()))
        where = f" (on rank {', '.join(map(str, reasons))}" if groups.world_size > 1 else ""
        if len({host for _, _, host in outcomes}) > 1:
            where += f" on {', '.join(dict.fromkeys(outcomes[rank][2] for rank in reasons))}"
        where += ")" if where else ""
        raise FailedError(f"{first}{where}")
    return [cast(T, result) for result, *_ in outcomes]


def steps(directory: Path) -> list[Path]:
    """The step folders that are there, highest step first."""
    found = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := re.fullmatch(r"global_step(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def has_its_files(folder: Path) -> bool:
    """Whether the files that the manifest lists are there with their sizes; True without one."""
    try:
        manifest = Manifest.read(folder)
        if manifest is not None:
            manifest.check_sizes()
    except CheckpointError:
        return False
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def write_file(path: Path, data: bytes) -> Entry:
    """Write and flush to the disk. Raises OSError."""
    hasher = Hasher()
    hasher.update(data)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hasher.entry()


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename what is whole to its name, and have `latest` name it. Each step survives a crash."""
    directory, unfinished = final.parent, aside.parent
    # The last that a full disk could prevent.
    write_file(unfinished / "latest", final.name.encode())
    if final.exists():
        final.rename(unfinished / f"{final.name}{_REPLACED}")
    aside.rename(final)
    _sync(directory)
    (unfinished / "latest").replace(directory / "latest")
    _sync(directory)
    shutil.rmtree(unfinished, ignore_errors=True)  # what stays will be deleted by the next save


def _recover(directory: Path) -> list[str]:
    """Undo what is unfinished; return what was done, for the user."""
    unfinished = directory / UNFINISHED
    if not unfinished.exists():
        return []
    lines = []
    for replaced in unfinished.glob(f"*{_REPLACED}"):
        final = directory / replaced.name.removesuffix(_REPLACED)
        if not final.exists():
            replaced.rename(final)
            _sync(directory)
            lines.append(f"put {final} back, which an interrupted save was about to replace")
    lines += [
        f"deleted what an interrupted save of {path.name} left in {unfinished}"
        for path in unfinished.glob("global_step*")
        if not path.suffix
    ]
    shutil.rmtree(unfinished, ignore_errors=True)
    return lines


def _clear(directory: Path) -> None:
    """`_recover` after a failure, which is about to be told: a second one would hide it."""
    try:
        _recover(directory)
    except OSError as error:
        log.warning(f"{directory / UNFINISHED} could not be cleared away: {_reason(error)}")


def _earlier(directory: Path) -> str:
    newest = next((folder for folder in steps(directory) if has_its_files(folder)), None)
    if newest is None:
        return "There is no earlier checkpoint."
    return f"Earlier checkpoints are untouched; the newest is {newest}."


def _delete(folder: Path) -> None:
    """Delete a checkpoint, never leaving a part of it under its name."""
    unfinished = folder.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    trash = folder.rename(unfinished / f"{folder.name}{_DELETED}")
    _sync(folder.parent)
    shutil.rmtree(trash)
    with contextlib.suppress(OSError):  # another remnant, which the next save deletes
        unfinished.rmdir()


def _sync(folder: Path) -> None:
    """Flush a folder's names to the disk; those who wrote its files have flushed them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
