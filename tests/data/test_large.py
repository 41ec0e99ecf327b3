"""Counts beyond 32 bits, without large files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from neox.data.blending import build_blend_index
from neox.data.documents import open_documents
from neox.data.indexed import bin_path, idx_path, open_indexed
from neox.data.order import epochs_needed, stream_order, whole_order
from neox.data.samples import open_samples
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import training_config, write_dataset

LONGEST = 2**31 - 1  # lengths are int32


def test_epochs_of_many_tokens() -> None:
    tokens, seq = 10**13 + 7, 2048
    samples = 3 * 10**13 // seq
    epochs = epochs_needed(tokens, seq, samples)
    assert (epochs * tokens - 1) // seq >= samples > ((epochs - 1) * tokens - 1) // seq


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_stream_of_more_tokens_than_int32_counts(epochs: int) -> None:
    lengths = np.full(3, LONGEST, dtype=np.int32)
    seq = 2**20 - 3
    stream, starts = stream_order(lengths, range(3), seq, epochs, seed=1)
    assert len(starts) == (3 * LONGEST * epochs - 1) // seq
    assert sorted(stream.tolist()) == sorted([0, 1, 2] * epochs)
    places = np.sort(starts[:, 0].astype(np.int64) * LONGEST + starts[:, 1])
    assert np.array_equal(places, np.arange(len(starts), dtype=np.int64) * seq)
    assert starts[:, 1].min() >= 0


def test_packing_long_documents() -> None:
    lengths = np.full(5, LONGEST, dtype=np.int32)
    usable = np.arange(5, dtype=np.int32)
    _, bounds = whole_order(lengths, usable, 2 * LONGEST, 4, seed=1, joined=True)
    # Two fit into a sample of 2 * (2^31 - 1) tokens, the fifth begins one of its own.
    assert bounds.tolist() == [0, 2, 4, 5, 7, 9, 10]
    assert bounds.dtype == np.int64


def test_a_blend_of_tiny_shares() -> None:
    shares = np.array([1 - 1e-9, 1e-9])
    dataset, index = build_blend_index(shares, 10**6)
    assert index.dtype == np.int64
    assert np.bincount(dataset).tolist()[0] >= 10**6 - 1


def write_sparse(prefix: Path, lengths: list[int]) -> None:
    """A dataset of int32 ids, all 0 in a file with a hole, but 7 in its last document."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64) * 4
    n = len(lengths)
    with open(idx_path(prefix), "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, n, n + 1))
        file.write(np.array(lengths, dtype=np.int32).tobytes())
        file.write(offsets[:-1].tobytes())
        file.write(np.arange(n + 1, dtype=np.int64).tobytes())
    with open(bin_path(prefix), "wb") as file:
        file.seek(int(offsets[-2]))
        file.write(np.full(lengths[-1], 7, dtype=np.int32).tobytes())


def test_documents_behind_four_gigabytes(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    write_sparse(prefix, [LONGEST, 10**9, 5])
    assert bin_path(prefix).stat().st_size > 2**32
    documents = open_documents(str(prefix), vocab_size=8)
    assert documents.read([(2, 1, 4)], 3).tokens_T.tolist() == [7, 7, 7]
    assert documents.read([(0, LONGEST - 2, LONGEST), (2, 0, 1)], 3).tokens_T.tolist() == [0, 0, 7]
    assert open_indexed(prefix).tokens == LONGEST + 10**9 + 5


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    write_sparse(prefix, [4, 4, 4])
    data = bytearray(idx_path(prefix).read_bytes())
    struct.pack_into("<i", data, 34, 100)  # the first document's length
    idx_path(prefix).write_bytes(data)
    documents = open_documents(str(prefix))
    with pytest.raises(DataError, match=r"points at tokens 0 to 100 of data.bin, which has 12"):
        documents.read([(0, 0, 100)], 100)


def test_a_dataset_that_would_be_repeated_without_end(tmp_path: Path) -> None:
    """As a validation split of one short document is, for many iterations."""
    write_dataset(tmp_path / "data", [3])
    config = training_config(tmp_path)
    documents = open_documents(str(tmp_path / "data"))
    message = r"10000000000 samples are 26666666667 epochs of documents 0 to 0 of .*, which have 3"
    with pytest.raises(DataError, match=message):
        open_samples(documents, range(1), 10**10, config, ProcessGroups.single())
