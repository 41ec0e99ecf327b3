"""Raw text corpora: JSON Lines (plain, gzip, Zstandard) and text files, read piece by piece."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from neox.errors import DataError

_JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_ENDINGS = (*_JSON_LINES, ".txt")
# Some tens of milliseconds of tokenizing: long against the cost of handing it to a process, short
# enough that a few per process in flight stay small and keep every process busy to the end.
_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of one JSON Lines file, or the whole of a text file as its one line."""

    path: Path
    first_line: int  # counted from 1
    lines: list[bytes]
    bytes_read: int  # of all files on disk, compressed or not, up to here

    def documents(self, keys: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """(line number, text under each of `keys`) of every line that is not blank.

        A list of paragraphs is joined by blank lines. DataError naming file and line where a line
        is not JSON, a key is missing, or its value is not text.
        """
        for number, line in enumerate(self.lines, start=self.first_line):
            if self.path.name.endswith(".txt"):
                yield number, [self._whole(line, keys)]
            elif line.strip():
                record = self._parse(number, line)
                yield number, [self._text(number, record, key) for key in keys]

    def _whole(self, text: bytes, keys: Sequence[str]) -> str:
        if len(keys) > 1:
            raise DataError(f"{self.path} is one text and cannot fill {len(keys)} --jsonl-keys")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text ({error})") from None

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            record = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            where = f"{self.path}:{number}, column {error.colno}"
            raise DataError(f"{where}: not JSON ({error.msg})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}:{number}: not UTF-8 text ({error})") from None
        if not isinstance(record, dict):
            found = type(record).__name__
            raise DataError(f"{self.path}:{number}: a JSON object is needed, this is a {found}")
        return record

    def _text(self, number: int, record: dict, key: str) -> str:
        if key not in record:
            raise DataError(
                f'{self.path}:{number}: no key "{key}"; this line has: '
                f"{', '.join(record) or 'none'} (choose with --jsonl-keys)"
            )
        value = record[key]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return "\n\n".join(value)
        if not isinstance(value, str):
            found = type(value).__name__
            raise DataError(f'{self.path}:{number}: "{key}" is a {found}, text is needed')
        return value


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files to read: each input is a file, or a folder whose readable files come by name.

    DataError when an input does not exist, is of an unknown kind, or is a folder without any.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"input {path} does not exist")
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        known = [file for file in found if file.is_file() and file.name.endswith(_ENDINGS)]
        if not known:
            where = "no file in" if path.is_dir() else "cannot read"
            raise DataError(f"{where} {path}: the name must end in {', '.join(_ENDINGS)}")
        files += known
    return files


def read_chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    """The files in pieces of whole lines. DataError when one is damaged or cannot be read."""
    before = 0
    for path in files:
        try:
            with open(path, "rb") as raw:
                if path.name.endswith(".txt"):
                    yield Chunk(path, 1, [raw.read()], before + raw.tell())
                else:
                    yield from _line_chunks(path, raw, before)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        before += path.stat().st_size


def _line_chunks(path: Path, raw: BinaryIO, before: int) -> Iterator[Chunk]:
    stream, damage = _decompressed(path, raw)
    first_line = 1
    with stream:
        try:
            while lines := stream.readlines(_CHUNK_BYTES):
                yield Chunk(path, first_line, lines, before + raw.tell())
                first_line += len(lines)
        except damage as error:
            raise DataError(f"{path} is damaged or cut off: {error}") from None


def _decompressed(
    path: Path, raw: BinaryIO
) -> tuple[IO[bytes] | gzip.GzipFile, tuple[type[Exception], ...]]:
    """The contents, and the exceptions that tell of a damaged or cut-off file."""
    if path.suffix == ".gz":
        return gzip.open(raw), (gzip.BadGzipFile, EOFError, zlib.error)
    if path.suffix == ".zst":
        zstd = _zstd()
        return zstd.open(raw), (zstd.ZstdError, EOFError)
    return raw, ()


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise DataError(".zst files need a package: pip install backports.zstd") from None
    return zstd
