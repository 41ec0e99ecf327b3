"""Tokenized corpora on disk.

`PREFIX.bin` holds the token ids of all documents end to end; `PREFIX.idx` says where each starts:

    9 bytes "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 n | uint64 d
    int32 length in tokens [n] | int64 offset in bytes [n] | int64 document boundaries [d = n + 1]
"""

from __future__ import annotations

import array
import fcntl
import glob
import hashlib
import resource
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from neox import log
from neox.atomic import replacing
from neox.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"  # upstream's `cached` and `lazy` datasets
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_BLOCKS, _BLOCK_SIZE = 16, 1 << 14  # what a fingerprint reads of a large file
_CHUNK = 1 << 23


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


class IndexedDataset:
    """Documents of token ids, memory-mapped; may be read from several threads."""

    def __init__(self, prefix: str, dtype: np.dtype, documents: int) -> None:
        """`open_indexed` finds `dtype` and `documents` in the files, and checks them."""
        self.path_prefix = prefix
        self.dtype = dtype
        # Plain arrays over the maps: a memmap object costs a microsecond at every slice.
        index = np.asarray(np.memmap(idx_path(prefix), mode="r", dtype=np.uint8))
        lengths_end = _HEADER.size + 4 * documents
        offsets_end = lengths_end + 8 * documents
        self.sequence_lengths = index[_HEADER.size : lengths_end].view(np.int32)
        self.sequence_offsets = index[lengths_end:offsets_end].view(np.int64)  # in bytes
        self._ids = np.asarray(np.memmap(bin_path(prefix), mode="r", dtype=dtype))

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of a document, from its token `offset` on: a view of the file."""
        if length is None:
            length = int(self.sequence_lengths[document]) - offset
        start = int(self.sequence_offsets[document]) // self.dtype.itemsize + offset
        return self.span(start, start + length)

    def span(self, start: int, stop: int) -> np.ndarray:
        """Ids by their place in the file, whatever the document. DataError outside of it."""
        if not 0 <= start <= stop <= len(self._ids):
            raise DataError(
                f"{idx_path(self.path_prefix)} points at tokens {start} to {stop} of "
                f"{bin_path(self.path_prefix).name}, which has {len(self._ids)}: it is damaged; "
                "tokenize the corpus again"
            )
        return self._ids[start:stop]


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open a dataset as memory maps. DataError when it is missing, damaged, or not one."""
    return IndexedDataset(str(prefix), *_check(prefix))


def _check(prefix: str | Path) -> tuple[np.dtype, int]:
    """(dtype, number of documents), when the counts agree with the sizes of both files.

    Takes constant time; finds files that are cut off or mixed up.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError(f"there is no dataset {prefix}: {path} is missing")
    size = idx_path(prefix).stat().st_size
    with open(idx_path(prefix), "rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            old = ", as --dataset-impl cached and lazy made them" * header.startswith(_OLD_MAGIC)
            raise DataError(
                f"{idx_path(prefix)} is not the index of a memory-mapped dataset (it starts with "
                f"{header[:9]!r}{old}); tokenize the corpus again with tools/preprocess_data.py"
            )
        if len(header) < _HEADER.size:
            raise DataError(f"{idx_path(prefix)} is cut off: {size} bytes")
        _, version, code, n, d = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise DataError(f"{idx_path(prefix)} has unknown version {version} or dtype {code}")
        expected = _HEADER.size + 12 * n + 8 * d
        if size < expected:
            raise DataError(
                f"{idx_path(prefix)} is cut off: {n} documents need {expected} bytes, it has {size}"
            )
        if n == 0:
            raise DataError(f"the dataset {prefix} has no documents")
        file.seek(_HEADER.size + 4 * (n - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(_HEADER.size + 4 * n + 8 * (n - 1))
        (offset,) = struct.unpack("<q", file.read(8))
    dtype = np.dtype(_DTYPES[code])
    expected = offset + length * dtype.itemsize
    size = bin_path(prefix).stat().st_size
    if size != expected or size == 0:
        raise DataError(
            f"{bin_path(prefix)} has {size} bytes, {idx_path(prefix).name} says {expected}: one of "
            "them is cut off or belongs to another dataset, or the dataset is empty"
        )
    return dtype, n


def fingerprint(prefix: str | Path) -> str:
    """What tells a dataset's content from another's, whatever its name and age.

    A hash of both files' sizes and of blocks spread evenly over them; of all of a small file.
    """
    digest = hashlib.blake2b(digest_size=10)
    for path in (idx_path(prefix), bin_path(prefix)):
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            step = max(_BLOCK_SIZE, (size - _BLOCK_SIZE) // (_BLOCKS - 1))
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_BLOCK_SIZE))
            file.seek(max(0, size - _BLOCK_SIZE))
            digest.update(file.read(_BLOCK_SIZE))
    return digest.hexdigest()


def allow_many_files() -> int:
    """Raise the limit on open files, two of each dataset, to what this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def warm_up(prefix: str | Path) -> None:
    """Read both files once, so that the system has them in memory."""
    paths = [idx_path(prefix), bin_path(prefix)]
    total = sum(path.stat().st_size for path in paths)
    with log.progress(total=total, desc=f"reading {prefix}", unit="B") as bar:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while read := file.read(_CHUNK):
                    bar.update(len(read))


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; they appear when the `with` block ends without an error.

    Ids are stored as `dtype` says, else as uint16 for a vocabulary below 65,500 (Megatron's rule),
    or int32. Memory: 4 bytes per document.
    """

    def __init__(
        self, prefix: str | Path, vocab_size: int = 0, *, dtype: np.dtype | None = None
    ) -> None:
        self.dtype = token_dtype(vocab_size) if dtype is None else dtype
        self._prefix = prefix
        self._lengths = array.array("i")
        self._files = ExitStack()

    def __enter__(self) -> IndexedWriter:
        self._bin = self._files.enter_context(_replacing(bin_path(self._prefix)))
        return self

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their `ids` end to end (of `self.dtype`), and int32 `lengths`."""
        assert len(ids) == lengths.sum(dtype=np.int64), (len(ids), lengths.sum())
        self.add_ids(ids)
        self.add_lengths(lengths)

    def add_ids(self, ids: np.ndarray) -> None:
        """The next ids, of `self.dtype`; `add_lengths` tells how they divide into documents."""
        assert ids.dtype == self.dtype, (ids.dtype, self.dtype)
        self._bin.write(np.ascontiguousarray(ids).data)

    def add_lengths(self, lengths: np.ndarray) -> None:
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            # An old index must not describe the new tokens, whenever we are interrupted.
            idx_path(self._prefix).unlink(missing_ok=True)
        self._files.__exit__(error_type, error, traceback)
        if error is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        offsets *= self.dtype.itemsize
        with _replacing(idx_path(self._prefix)) as file:
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(offsets[:-1].data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """`replacing`, and killed processes' parts are removed; those of the living hold a lock."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError), open(part, "rb") as abandoned:
            fcntl.flock(abandoned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    with replacing(path) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def token_dtype(vocab_size: int) -> np.dtype:
    """How Megatron stores ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
