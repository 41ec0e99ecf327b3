"""Tokenized corpora on disk, and the one door to megatron-core's datasets.

`PREFIX.bin` holds the token ids of all documents end to end; `PREFIX.idx` says where each starts:

    9 bytes "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 n | uint64 d
    int32 length in tokens [n] | int64 offset in bytes [n] | int64 document boundaries [d = n + 1]

Reading and the index builders are megatron-core's, whose import costs seconds: hence inside the
functions. Writing is done here, because preprocessing needs nothing else of megatron-core or torch
and megatron-core's writer keeps Python lists of a hundred bytes per document.
"""

from __future__ import annotations

import array
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from neox.atomic import replacing
from neox.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_UINT16, _INT32 = 8, 4


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def open_indexed(prefix: str) -> IndexedDataset:
    """Open a dataset as memory maps. DataError when it is missing, damaged, or not one."""
    _check(prefix)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix)


def _check(prefix: str) -> None:
    """Compare the header's counts with the sizes of both files: constant time, finds truncation."""
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError(f"there is no dataset {prefix}: {path} is missing")
    size = idx_path(prefix).stat().st_size
    with open(idx_path(prefix), "rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise DataError(
                f"{idx_path(prefix)} is not the index of a memory-mapped dataset (it starts with "
                f"{header[:9]!r}); tokenize the corpus again with tools/preprocess_data.py"
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
    expected = offset + length * np.dtype(_DTYPES[code]).itemsize
    size = bin_path(prefix).stat().st_size
    if size != expected or size == 0:
        raise DataError(
            f"{bin_path(prefix)} has {size} bytes, {idx_path(prefix).name} says {expected}: one of "
            "them is cut off or belongs to another dataset, or the dataset is empty"
        )


def build_sample_index(
    lengths: np.ndarray, documents: np.ndarray, seq_length: int, epochs: int, tokens: int
) -> np.ndarray:
    """Where each sample starts in the stream of `documents`: [samples + 1, 2].

    Row i is (position in `documents`, offset in tokens within that document) of stream position
    i * seq_length. `lengths` int32: tokens of every document of the dataset; `documents` int32: the
    stream; `tokens`: of one epoch. The result is int32, or int64 where that is too small.
    """
    from megatron.core.datasets import helpers

    return helpers.build_sample_idx(lengths, documents, seq_length, epochs, tokens)


def build_blend_index(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `size` samples: int16 dataset, int64 index within it, following `weights`.

    Greedy: every sample comes from the dataset that is furthest behind weight * samples so far.
    `weights` are float64 and sum to 1.
    """
    from megatron.core.datasets import helpers

    dataset = np.empty(size, dtype=np.int16)
    index = np.empty(size, dtype=np.int64)
    helpers.build_blending_indices(dataset, index, weights, len(weights), size, False)
    return dataset, index


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; they appear when the `with` block ends without an error.

    Ids are stored as uint16 for a vocabulary below 65,500 (Megatron's rule), else as int32.
    Memory: 4 bytes per document.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.dtype = token_dtype(vocab_size)
        self._prefix = prefix
        self._lengths = array.array("i")
        self._files = ExitStack()

    def __enter__(self) -> IndexedWriter:
        self._bin = self._files.enter_context(replacing(bin_path(self._prefix)))
        return self

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their `ids` end to end (of `self.dtype`), and int32 `lengths`."""
        assert ids.dtype == self.dtype and len(ids) == lengths.sum(), (ids.dtype, len(ids))
        self._bin.write(ids.data)
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
        code = _UINT16 if self.dtype == np.uint16 else _INT32
        with replacing(idx_path(self._prefix)) as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(offsets[:-1].data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


def token_dtype(vocab_size: int) -> np.dtype:
    """How Megatron stores ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)
