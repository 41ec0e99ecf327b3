"""torch's files: read without running what is in them, checksummed while they are written."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neox.checkpoint.manifest import Entry, Hasher
from neox.errors import DamageError


def load_file(
    path: Path, map_location: Any = "cpu", *, mmap: bool = False, classes: Sequence[Any] = ()
) -> Any:
    """torch.load that runs no code: tensors, numbers, plain containers, and instances of `classes`.

    With `mmap` tensors are views of the file, read when they are touched.
    Raises DamageError for anything else and for every kind of damage.
    """
    try:
        # Files of before torch 1.6 are no zip archives, and cannot be mapped.
        mmap = mmap and zipfile.is_zipfile(path)
        with _allowed(classes):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamageError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code."
        ) from error
    except Exception as error:  # an unpickler can stumble over damage in any way
        raise DamageError(f"{path} cannot be read: {_first_line(error)}") from error


@contextmanager
def _allowed(classes: Sequence[Any]) -> Iterator[None]:
    """Let torch.load make instances of `classes`, and not of those that a library has allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def check_crc(path: Path) -> None:
    """Read a file of torch's through and compare the checksums that its zip archive carries.

    Files of before torch 1.6 carry none. Raises DamageError naming the file.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        elif _starts_as_zip(path):
            damaged = "the archive's end"
        else:
            damaged = None
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise DamageError(f"{path} is damaged: {_first_line(error)}") from error
    if damaged is not None:
        raise DamageError(f"{path} is damaged: the checksum of {damaged} in it is wrong.")


def save_file(contents: object, path: Path) -> Entry:
    """torch.save, flushed to the disk. The checksum is of what was meant to be written.

    A disk that changes it on the way is thus found out. Raises what torch hides behind an error of
    its own: OSError with the system's reason (a full disk), and what a signal raises.
    """
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(contents, hashing)  # type: ignore[arg-type]  # it writes and flushes only
        except RuntimeError as error:
            if isinstance(error.__context__, OSError | KeyboardInterrupt | SystemExit):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return hashing.hasher.entry()


def _starts_as_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


class _HashingFile:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hasher = Hasher()

    def write(self, data: bytes) -> int:
        self.hasher.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
