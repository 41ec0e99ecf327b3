"""train_epochs: how many steps there are, and that nothing is read more often than it says."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from neox.config import NeoXConfig
from neox.data.loaders import Loaders, build_loaders, settle_iterations
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from neox.train.schedule import learning_rate
from tests.data.datasets import naive_order, training_config, write_dataset

LENGTHS = [60, 1, 33, 90, 25, 47, 80, 9, 40, 50]
SINGLE = ProcessGroups.single()


def epochs_config(folder: Path, epochs: int, **values) -> NeoXConfig:
    return training_config(folder, train_iters=None, train_epochs=epochs, **values)


def build(folder: Path, epochs: int, iteration: int = 0, **values) -> tuple[NeoXConfig, Loaders]:
    config = settle_iterations(epochs_config(folder, epochs, **values), SINGLE)
    return config, build_loaders(config, SINGLE, iteration, 0)


def train_rows(loaders: Loaders, count: int) -> np.ndarray:
    assert loaders.train is not None
    return np.concatenate([batch.tokens_BS for batch in itertools.islice(loaders.train, count)])


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_iterations_follow_from_the_data(tmp_path: Path, epochs: int, capsys) -> None:
    documents = write_dataset(tmp_path / "data", LENGTHS)
    config, loaders = build(tmp_path, epochs)
    samples = naive_order(documents, 0, 8, 1, 8, 7)  # one epoch of the training documents
    assert len(samples) == (sum(LENGTHS[:8]) - 1) // 8
    assert config.train_iters == len(samples) * epochs // 4
    assert config.origin("train_iters") == "derived"
    line = f"train_iters {config.train_iters} = {len(samples)} samples x {epochs}"
    assert line in capsys.readouterr().out
    # One order, repeated: after an epoch it starts over, in the middle of a batch if need be.
    read = train_rows(loaders, 2 * config.train_iters)
    assert np.array_equal(read, np.tile(samples, (epochs, 1))[: len(read), :-1])
    assert len(samples) * epochs - len(read) < 4  # what is left does not fill a batch


def test_a_resumed_run_goes_on_in_its_epoch(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    config, whole = build(tmp_path, 3)
    read = train_rows(whole, 2 * config.train_iters)
    for iteration in (1, 11, config.train_iters - 1):
        _, rest = build(tmp_path, 3, iteration)
        left = config.train_iters - iteration
        assert np.array_equal(train_rows(rest, 2 * left), read[4 * iteration :])


def test_without_the_key_nothing_is_settled(tmp_path: Path) -> None:
    config = training_config(tmp_path)  # there is no data either
    assert settle_iterations(config, SINGLE) is config


@pytest.mark.parametrize("values", [{"lr_decay_fraction": 0.5}, {"lr_decay_iters": 20}, {}])
def test_the_schedule_knows_the_end(tmp_path: Path, values) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    config, _ = build(tmp_path, 2, **values)
    end = values.get("lr_decay_iters", int(config.train_iters * values.get("lr_decay_fraction", 1)))
    assert learning_rate(config, end - 1) > 0 == learning_rate(config, end)


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
def test_whole_documents_are_read_once_an_epoch(tmp_path: Path, packing: str) -> None:
    write_dataset(tmp_path / "data", [5] * 60)
    config, loaders = build(tmp_path, 3, split="1", pack_impl=packing, seq_length=4)
    assert config.train_iters == 60 * 3 // 4
    read = train_rows(loaders, 2 * config.train_iters)
    assert set(Counter(read[:, 0].tolist()).values()) == {3}


def test_a_blend_reads_every_dataset_once_an_epoch(tmp_path: Path) -> None:
    sizes = {"a": 81, "b": 401, "c": 41}  # 10, 50 and 5 samples
    for n, (name, size) in enumerate(sizes.items()):
        write_dataset(tmp_path / name, [size], first=1000 * n)
    paths = [str(tmp_path / name) for name in sizes]
    data = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    config, loaders = build(tmp_path, 4, data_path=None, split=None, **data)
    assert config.train_iters == 65 * 4 // 4
    read = train_rows(loaders, 2 * config.train_iters)
    assert set(Counter(read[:, 0].tolist()).values()) == {4}
    assert np.array_equal(read[:65], read[65:130])
    # Not one dataset after another: every stretch holds its share of each.
    from_b = np.cumsum(read[:65, 0] // 1000 == 1)
    assert np.abs(from_b - np.arange(1, 66) * 50 / 65).max() <= 2


def test_too_little_data(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [8, 5, 5])
    with pytest.raises(DataError, match=r"have 8 tokens, but a sample takes seq_length \+ 1 = 9"):
        build(tmp_path, 1, split="1,1,1")
    write_dataset(tmp_path / "data", [20])
    with pytest.raises(DataError, match=r"train_epochs \(1\) of 2 samples do not fill one batch"):
        build(tmp_path, 1, split="1")
    assert build(tmp_path, 2, split="1")[0].train_iters == 1
