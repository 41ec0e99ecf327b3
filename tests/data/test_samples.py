from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox.data.documents import open_documents
from neox.data.indexed import idx_path
from neox.data.order import epochs_needed, split_documents
from neox.data.samples import Samples, open_samples
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import naive_order, training_config, write_dataset


def open_range(
    folder: Path, documents: range, num_samples: int, *, vocab_size: int | None = None, **values
) -> Samples:
    config = training_config(folder, **values)
    opened = open_documents(str(folder / "data"), vocab_size=vocab_size)
    return open_samples(opened, documents, num_samples, config, ProcessGroups.single())


def all_of(samples: Samples) -> np.ndarray:
    return np.stack([samples[n].tokens_T for n in range(len(samples))])


@pytest.mark.parametrize("case", range(40))
def test_order_equals_a_plain_reading(tmp_path: Path, case: int, monkeypatch) -> None:
    if case % 2:
        monkeypatch.setattr("neox.data.order._CHUNK", 3)
    random = np.random.default_rng(case)
    lengths = random.choice([0, 1, 2, 3, 7, 40], size=random.integers(1, 12)).tolist()
    lengths[random.integers(len(lengths))] = 5  # at least one document with tokens
    documents = write_dataset(tmp_path / "data", lengths)
    first = int(random.integers(len(lengths)))
    last = int(random.integers(first, len(lengths))) + 1
    seq, seed = int(random.integers(1, 20)), int(random.integers(1000))
    tokens = sum(lengths[first:last])
    num_samples = int(random.integers(1, 4 * tokens // seq + 2))  # up to about four epochs
    values = {"seq_length": seq, "max_position_embeddings": seq, "seed": seed}
    if tokens == 0:
        with pytest.raises(DataError, match="have no tokens"):
            open_range(tmp_path, range(first, last), num_samples, **values)
        return

    samples = open_range(tmp_path, range(first, last), num_samples, **values)

    expected = naive_order(documents, first, last, num_samples, seq, seed)
    assert len(samples) >= num_samples
    assert np.array_equal(all_of(samples), expected)


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 5])
def test_epochs_are_the_fewest_that_suffice(tokens: int, num_samples: int) -> None:
    epochs = epochs_needed(tokens, 5, num_samples)
    assert (epochs * tokens - 1) // 5 >= num_samples
    assert epochs == 1 or ((epochs - 1) * tokens - 1) // 5 < num_samples


@pytest.mark.parametrize(
    ("split", "count", "sizes"),
    [
        ("900,50,50", 79, [71, 4, 4]),
        ("969, 30, 1", 100, [97, 3, 0]),
        ("969, 30, 1", 1000, [969, 30, 1]),
        ("8/1/1", 10, [8, 1, 1]),
        ("1", 5, [5, 0, 0]),
        ("1,1", 5, [3, 2, 0]),  # each rounds to 2
        ("1,1,1", 5, [1, 2, 2]),  # each rounds to 2
        ("0,1,1", 3, [0, 1, 2]),
        ("0,1,0", 3, [0, 3, 0]),
        ("9,1,0", 1, [1, 0, 0]),
    ],
)
def test_split(split: str, count: int, sizes: list[int]) -> None:
    ranges = split_documents(split, count)
    assert [len(r) for r in ranges] == sizes
    assert [n for r in ranges for n in r] == list(range(count))


def test_samples_are_not_read_through_to_documents_of_another_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [50, 50])
    samples = open_range(tmp_path, range(1, 2), 5)
    assert all_of(samples).min() >= 50


def test_an_order_is_kept_and_reused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [50, 50])
    before = all_of(open_range(tmp_path, range(2), 5))
    files = sorted((tmp_path / "index_cache").iterdir())
    written = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 3
    assert np.array_equal(all_of(open_range(tmp_path, range(2), 6)), before)  # still one epoch
    assert sorted((tmp_path / "index_cache").iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files] == written


@pytest.mark.parametrize(
    ("documents", "num_samples", "values"),
    [
        (range(3), 30, {}),  # more epochs
        (range(2), 5, {}),  # as after a change of split
        (range(1, 3), 5, {}),
        (range(3), 5, {"seed": 8}),
        (range(3), 5, {"seq_length": 7, "max_position_embeddings": 7}),
    ],
)
def test_a_change_is_seen(tmp_path: Path, documents: range, num_samples: int, values) -> None:
    contents = write_dataset(tmp_path / "data", [50, 40, 30])
    open_range(tmp_path, range(3), 5)  # leaves its order in the cache
    samples = open_range(tmp_path, documents, num_samples, **values)
    seq, seed = values.get("seq_length", 8), values.get("seed", 7)
    expected = naive_order(contents, documents.start, documents.stop, num_samples, seq, seed)
    assert np.array_equal(all_of(samples), expected)


def test_a_rewritten_dataset_is_seen(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [50, 40, 30])
    open_range(tmp_path, range(3), 5)
    before = idx_path(tmp_path / "data").stat()
    contents = write_dataset(tmp_path / "data", [30, 40, 50])  # files of the same sizes
    assert idx_path(tmp_path / "data").stat().st_size == before.st_size
    samples = open_range(tmp_path, range(3), 5)
    assert np.array_equal(all_of(samples), naive_order(contents, 0, 3, 5, 8, 7))


def test_a_read_only_folder_of_data_gets_no_cache(tmp_path: Path) -> None:
    data, logs = tmp_path / "data", tmp_path / "logs"
    data.mkdir()
    contents = write_dataset(data / "data", [50, 50])
    data.chmod(0o555)
    samples = open_range(data, range(2), 5, log_dir=str(logs))
    assert np.array_equal(all_of(samples), naive_order(contents, 0, 2, 5, 8, 7))
    assert sorted(file.suffix for file in data.iterdir()) == [".bin", ".idx"]
    assert len(list((logs / "index_cache").iterdir())) == 3
    data.chmod(0o755)


def test_an_order_in_a_read_only_folder_is_used(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [50, 50])
    open_range(tmp_path, range(2), 5)
    tmp_path.chmod(0o555)
    open_range(tmp_path, range(2), 5, log_dir=str(tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()
    tmp_path.chmod(0o755)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [50])
    samples = open_range(tmp_path, range(1), 5, vocab_size=50)
    all_of(samples)
    samples = open_range(tmp_path, range(1), 5, vocab_size=40)
    with pytest.raises(DataError, match="made with another tokenizer"):
        all_of(samples)


def test_a_negative_length_is_damage(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [9, 20, 11])
    path = idx_path(tmp_path / "data")
    damaged = bytearray(path.read_bytes())
    damaged[34 + 4 : 34 + 8] = np.int32(-20).tobytes()  # after a header of 34 bytes
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"data\.idx has a document of less than no tokens"):
        open_range(tmp_path, range(3), 4)
