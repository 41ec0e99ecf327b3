"""Arrays in numpy's .npz files: where they are and what they are. Stricter than numpy.

An array of Python objects is a pickle, and is refused like every other kind that is not listed.
"""

from __future__ import annotations

import ast
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from neox.errors import DamageError

# What a header calls the kinds of numbers, and their names here. Numpy knows no bfloat16: two bytes
# without a meaning.
_KINDS = {
    "<f4": "float32",
    "<f2": "float16",
    "<V2": "bfloat16",
    "|V2": "bfloat16",
    "<i4": "int32",
    "<u4": "uint32",
    "<i8": "int64",
}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "int64": 8}
_MEMBER = re.compile(r"arr_(\d+)\.npy$")
_MAGIC = b"\x93NUMPY"
_LONGEST = 10_000  # bytes of a header; numpy draws the same line
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Array:
    """One array of a file: `dtype` is torch's name, `is_column_major` what Fortran's order is."""

    path: Path
    member: str
    dtype: str
    shape: tuple[int, ...]
    is_column_major: bool
    start: int  # of the numbers, in the member

    def __str__(self) -> str:
        return f"{self.member} in {self.path}"

    @property
    def nbytes(self) -> int:
        return _BYTES[self.dtype] * prod(self.shape)

    def read(self) -> bytearray:
        """The numbers; the archive's checksum is compared. Raises DamageError."""
        with _opened(self.path) as archive, archive.open(self.member) as file:
            _read(file, self.start)
            data, done = bytearray(self.nbytes), 0
            while done < len(data):
                chunk = _read(file, min(_CHUNK, len(data) - done))
                data[done : done + len(chunk)] = chunk
                done += len(chunk)
            file.read(1)  # the checksum is compared at the end
        return data


def arrays(path: Path) -> list[Array]:
    """Those of a file that numpy.savez(file, *arrays) wrote, in their order; only headers are read.

    Raises DamageError for a file of any other content.
    """
    with _opened(path) as archive:
        members: dict[int, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            match = _MEMBER.fullmatch(info.filename)
            if match is None or int(match[1]) in members:
                raise DamageError(
                    f"{path} holds {info.filename[:100]!r}, which numpy.savez of unnamed arrays "
                    "does not write: it is no part of this checkpoint."
                )
            members[int(match[1])] = info
        if missing := sorted(set(range(len(members))) - members.keys()):
            raise DamageError(f"{path} is damaged: it lacks arr_{missing[0]}.npy.")
        return [_array(path, archive, members[number]) for number in sorted(members)]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise DamageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise DamageError(f"{path} is damaged: {str(error)[:200]}.") from error


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as file:
        start, header = _header(file)
    said = f"{path} is damaged: the header of {info.filename}"
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise DamageError(f"{said} is not one of numpy's.")
    kind, shape, order = header["descr"], header["shape"], header["fortran_order"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DamageError(f"{said} tells of {str(kind)[:50]!r}, which is no number of a model.")
    if (
        not isinstance(order, bool)
        or not isinstance(shape, tuple)
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        raise DamageError(f"{said} has no shape: {str(shape)[:50]}.")
    array = Array(path, info.filename, _KINDS[kind], shape, order and len(shape) > 1, start)
    if info.file_size != start + array.nbytes:
        raise DamageError(
            f"{said} tells of {array.nbytes} bytes of numbers, and there are "
            f"{info.file_size - start}."
        )
    return array


def _header(file: IO[bytes]) -> tuple[int, Any]:
    """Where the numbers begin, and what is said of them; None for what is no header."""
    start = _read(file, 8)
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        return 0, None
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(_read(file, width), "little")
    if length > _LONGEST:
        return 0, None
    text = _read(file, length)
    try:
        return 8 + width + length, ast.literal_eval(text.decode().strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return 0, None


def _read(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError("an array ends before its numbers")
    return data
