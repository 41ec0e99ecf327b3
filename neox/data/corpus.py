"""Raw text corpora: JSON Lines, JSON arrays, texts, and archives of them, read piece by piece."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neox.data.archives import ARCHIVES, COMPRESSED, contents_name, damage, walk
from neox.errors import DataError

_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt",)
_LENGTHS_AND_TEXTS = (".dat",)
_CONTENTS = (*_JSON, *_TEXT, *_LENGTHS_AND_TEXTS, *ARCHIVES)
# Some tens of milliseconds of tokenizing: long against the cost of handing it to a process, short
# enough that a few per process in flight stay small and keep every process busy to the end.
_CHUNK_BYTES = 512 * 1024


@dataclass(frozen=True)
class Record:
    """A JSON object, or a text of its own; `where` it stands, for a message."""

    where: str
    value: dict[str, Any] | str

    def get(self, key: str) -> Any:
        """The value under `key`. DataError: there is none."""
        if isinstance(self.value, str):
            raise DataError(f'{self.where} is one text and has no key "{key}"')
        if key not in self.value:
            raise DataError(
                f'{self.where}: no key "{key}"; this line has: '
                f"{', '.join(self.value) or 'none'} (choose with --jsonl-keys)"
            )
        return self.value[key]

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The text under each key; a list of paragraphs is joined by blank lines.

        What is one text by itself stands for the one key there is. DataError: not text.
        """
        if isinstance(self.value, str):
            if len(keys) > 1:
                raise DataError(
                    f"{self.where} is one text and cannot fill {len(keys)} --jsonl-keys"
                )
            return [self.value]
        return [self._text(key) for key in keys]

    def _text(self, key: str) -> str:
        value = self.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return "\n\n".join(value)
        if not isinstance(value, str):
            found = type(value).__name__
            raise DataError(f'{self.where}: "{key}" is a {found}, text is needed')
        return value


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents as they stand in a file: lines, of JSON or of text, or whole texts."""

    places: list[str] | None  # of each text; None for lines
    name: str  # of the file whose lines these are
    first_line: int  # counted from 1
    lines: list[bytes]
    bytes_read: int  # of all files on disk, compressed or not, up to here
    is_json: bool = True  # what the lines are

    def records(self) -> Iterator[Record]:
        """Every document but blank lines. DataError naming file and line where one is not good."""
        if self.places is not None:
            for where, text in zip(self.places, self.lines, strict=True):
                yield Record(where, _decode(where, text))
            return
        for number, line in enumerate(self.lines, start=self.first_line):
            if line.strip():
                where = f"{self.name}:{number}"
                yield Record(where, _parse(where, line) if self.is_json else _text(where, line))

    def blank(self) -> int:
        """How many lines are blank, of which `records` gives none."""
        return 0 if self.places is not None else sum(not line.strip() for line in self.lines)


def _decode(where: str, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error})") from None


def _text(where: str, line: bytes) -> str:
    """A line without its end."""
    return _decode(where, line.removesuffix(b"\n").removesuffix(b"\r"))


def _parse(where: str, line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error})") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: not JSON that Python reads ({error})") from None
    except RecursionError:
        raise DataError(f"{where}: brackets too many levels deep") from None
    if not isinstance(value, dict | str):
        found = type(value).__name__
        raise DataError(f"{where}: a JSON object is needed, this is a {found}")
    return value


def find_files(inputs: Sequence[str | Path], *, any_name: bool = False) -> list[Path]:
    """The files to read: each input is a file, or a folder whose readable files come by name.

    With `any_name` a file whose name tells nothing is taken for a text.
    DataError when an input does not exist, is of an unknown kind, or is a folder without any.
    """
    files: list[Path] = []
    if not inputs:
        raise DataError("--input names no file")
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"input {path} does not exist")
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        known = [
            file
            for file in found
            if not file.is_dir() and (any_name or contents_name(file.name).endswith(_CONTENTS))
        ]
        if not known:
            where = "no file in" if path.is_dir() else "cannot read"
            raise DataError(
                f"{where} {path}: the name must end in {', '.join(_CONTENTS)}, with "
                f"{', '.join(COMPRESSED)} behind it where it is compressed"
            )
        files += known
    return files


def read_chunks(files: Sequence[Path], *, texts_by_line: bool = False) -> Iterator[Chunk]:
    """The documents of all files, in order. DataError when one is damaged or cannot be read.

    `texts_by_line`: each line of a text is a document, not all of it.
    """
    return _Reader(texts_by_line).read(files)


class _Reader:
    """Gathers chunks of about the same size, whatever the files' sizes."""

    def __init__(self, texts_by_line: bool) -> None:
        self._texts_by_line = texts_by_line
        self._texts: list[bytes] = []
        self._places: list[str] = []
        self._size = 0
        self._bytes_read = 0
        self._position: Callable[[], int] = lambda: 0

    def read(self, files: Sequence[Path]) -> Iterator[Chunk]:
        broken = damage()
        for path in files:
            name, line = str(path), 0
            try:
                with open(path, "rb") as raw:
                    self._position = raw.tell if raw.seekable() else lambda: 0
                    for name, stream in walk(str(path), raw):
                        line = 0
                        for chunk in self._file(name, stream):
                            if chunk.places is None:
                                line = chunk.first_line + len(chunk.lines) - 1
                            yield chunk
            except broken as error:
                after = f" after line {line}" if line else ""
                reason = str(error) or type(error).__name__
                raise DataError(f"{name} is damaged or cut off{after}: {reason}") from None
            except OSError as error:
                raise DataError(f"cannot read {name}: {error.strerror or error}") from None
            self._bytes_read += path.stat().st_size
            self._position = lambda: 0
        yield from self._flush()

    def _file(self, name: str, stream: IO[bytes]) -> Iterator[Chunk]:
        kind = contents_name(name)
        if kind.endswith(_JSON):
            yield from self._flush()
            yield from self._lines(name, stream, is_json=True)
        elif kind.endswith(_LENGTHS_AND_TEXTS):
            for number, text in enumerate(_lengths_and_texts(stream), start=1):
                yield from self._add(f"{name}, document {number}", text)
        elif self._texts_by_line:
            yield from self._flush()
            yield from self._lines(name, stream, is_json=False)
        else:  # inside an archive, whatever is not JSON is a text, with or without an ending
            yield from self._add(name, stream.read())

    def _lines(self, name: str, stream: IO[bytes], *, is_json: bool) -> Iterator[Chunk]:
        first_line = 1
        while lines := stream.readlines(_CHUNK_BYTES):
            if is_json and first_line == 1 and _is_array(name, lines[0]):
                lines = _elements(name, b"".join([*lines, *stream]))
            yield Chunk(None, name, first_line, lines, self._bytes(), is_json)
            first_line += len(lines)

    def _add(self, place: str, text: bytes) -> Iterator[Chunk]:
        self._places.append(place)
        self._texts.append(text)
        self._size += len(text)
        if self._size >= _CHUNK_BYTES:
            yield from self._flush()

    def _flush(self) -> Iterator[Chunk]:
        if self._texts:
            yield Chunk(self._places, "", 1, self._texts, self._bytes())
            self._texts, self._places, self._size = [], [], 0

    def _bytes(self) -> int:
        return self._bytes_read + self._position()


def _is_array(name: str, first_line: bytes) -> bool:
    """Whether a .json file is one array of documents, as lm_dataformat writes it, and not lines."""
    start = first_line.removeprefix(codecs.BOM_UTF8).lstrip()
    return contents_name(name).endswith(".json") and start.startswith(b"[")


def _elements(name: str, text: bytes) -> list[bytes]:
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a JSON array ({error})") from None
    return [json.dumps(element).encode() for element in elements]


def _lengths_and_texts(stream: IO[bytes]) -> Iterator[bytes]:
    """The texts of a .dat file of lm_dataformat: each behind its length in 16 digits."""
    while digits := stream.read(16):
        if len(digits) < 16 or not digits.isdigit():
            raise EOFError(f"a length of 16 digits was expected, not {digits!r}")
        try:
            text = stream.read(int(digits))
        except MemoryError:
            raise EOFError(f"a text of {int(digits)} bytes does not fit into memory") from None
        if len(text) < int(digits):
            raise EOFError(f"{int(digits)} bytes were expected, {len(text)} are left")
        yield text
