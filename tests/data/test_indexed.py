from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.data.indexed import (
    IndexedWriter,
    bin_path,
    fingerprint,
    idx_path,
    open_indexed,
    token_dtype,
    warm_up,
)
from neox.errors import DataError
from tests.data.datasets import write_dataset


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 100000])
def test_files_equal_megatrons_own(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents = [[1, 2, 3], [], [999], [5, 6]]
    lengths = np.array([len(document) for document in documents])
    dtype = token_dtype(vocab_size)
    with IndexedWriter(tmp_path / "ours", vocab_size) as writer:
        writer.add(np.array([1, 2, 3, 999], dtype=dtype), lengths[:3])
        writer.add(np.array([5, 6], dtype=dtype), lengths[3:])

    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))

    for ending in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{who}.{ending}" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    documents = write_dataset(tmp_path / "data", [3, 0, 5])
    indexed = open_indexed(str(tmp_path / "data"))
    assert len(indexed) == 3
    for n, document in enumerate(documents):
        assert indexed.get(n).tolist() == document.tolist()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".out.{ending}.x1y2" for ending in ("bin", "idx")]
    for path in left:
        path.write_bytes(b"part")
    write_dataset(tmp_path / "out", [1])
    assert not any(path.exists() for path in left)


def test_an_error_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [3, 4])
    before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())

    def fail_half_way() -> None:
        with IndexedWriter(tmp_path / "data", vocab_size=10) as writer:
            writer.add(np.array([1, 2], dtype=np.uint16), np.array([2]))
            raise DataError("bad input")

    with pytest.raises(DataError, match="bad input"):
        fail_half_way()
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == before


def damage_magic(prefix: Path) -> None:
    idx_path(prefix).write_bytes(b"TNTIDX\x00\x00" + idx_path(prefix).read_bytes()[8:])


def damage_version(prefix: Path) -> None:
    data = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(data[:9] + struct.pack("<Q", 2) + data[17:])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: idx_path(prefix).unlink(), "data.idx is missing"),
        (lambda prefix: bin_path(prefix).unlink(), "data.bin is missing"),
        (damage_magic, "not the index of a memory-mapped dataset"),
        (damage_version, "unknown version 2"),
        (lambda prefix: cut(idx_path(prefix), 0), "not the index of a memory-mapped dataset"),
        (lambda prefix: cut(idx_path(prefix), 20), "cut off: 20 bytes"),
        (lambda prefix: cut(idx_path(prefix), 60), "2 documents need 82 bytes, it has 60"),
        (lambda prefix: cut(bin_path(prefix), 10), "data.bin has 10 bytes, data.idx says 14"),
        (lambda prefix: write_dataset(prefix, [0, 0]), "data.bin has 0 bytes"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage, message: str) -> None:
    prefix = tmp_path / "data"
    write_dataset(prefix, [3, 4])
    damage(prefix)
    with pytest.raises(DataError) as caught:
        open_indexed(str(prefix))
    assert message in str(caught.value)


def test_a_dataset_without_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", vocab_size=10):
        pass
    with pytest.raises(DataError, match="no documents"):
        open_indexed(str(tmp_path / "data"))


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for prefix in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        write_dataset(prefix, [3, 40, 500])
    write_dataset(tmp_path / "other", [3, 500, 40])
    same = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "elsewhere" / "b") == same
    assert fingerprint(tmp_path / "other") != same
    data = bytearray(bin_path(tmp_path / "a").read_bytes())
    data[len(data) // 2] ^= 1
    bin_path(tmp_path / "a").write_bytes(data)
    assert fingerprint(tmp_path / "a") != same


@pytest.mark.parametrize("size", [1, 2**14 - 1, 2**14 + 1, 2**18 - 1, 2**18 + 1, 10**6])
def test_a_fingerprint_reads_the_end_and_no_more_than_it_must(tmp_path: Path, size: int) -> None:
    write_dataset(tmp_path / "a", [size])
    same = fingerprint(tmp_path / "a")
    data = bytearray(bin_path(tmp_path / "a").read_bytes())
    data[-1] ^= 1
    bin_path(tmp_path / "a").write_bytes(data)
    assert fingerprint(tmp_path / "a") != same


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_every_integer_type(tmp_path: Path, dtype: type) -> None:
    ids = np.array([1, 2, 3, 100]).astype(dtype)
    with IndexedWriter(tmp_path / "data", dtype=np.dtype(dtype)) as writer:
        writer.add(ids, np.array([3, 1]))
    indexed = open_indexed(tmp_path / "data")
    assert indexed.dtype == dtype
    assert indexed.get(0).tolist() == [1, 2, 3]
    assert indexed.get(0, 1, 2).tolist() == [2, 3]
    assert indexed.get(1).tolist() == [100]


def test_warming_up_reads_everything(tmp_path: Path, monkeypatch) -> None:
    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, read: int) -> None:
            progress.append(read)

    progress: list[int] = []
    monkeypatch.setattr("neox.data.indexed._CHUNK", 100)
    monkeypatch.setattr("neox.log.progress", lambda **about: Bar())
    write_dataset(tmp_path / "data", [300])
    warm_up(tmp_path / "data")
    size = sum(path(tmp_path / "data").stat().st_size for path in (bin_path, idx_path))
    assert sum(progress) == size


def test_upstreams_older_format_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [3])
    idx_path(tmp_path / "data").write_bytes(b"TNTIDX\0\0" + bytes(50))
    with pytest.raises(DataError, match="as --dataset-impl cached and lazy made them"):
        open_indexed(tmp_path / "data")
