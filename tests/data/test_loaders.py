from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.data.documents import Sample
from neox.data.loaders import Batch, Loader, Loaders, build_loaders
from neox.data.samples import Origin
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from tests.data.datasets import naive_order, training_config, write_dataset, write_labels
from tests.world import World

LENGTHS = [60, 1, 33, 90, 25, 47, 80, 9, 40, 50]  # with split 8,1,1: train 0-7, valid 8, test 9
EOD = 5


def build(folder: Path, iteration: int = 0, **values) -> Loaders:
    config = training_config(folder, **values)
    return build_loaders(config, ProcessGroups.single(), iteration, EOD)


def rows(loader: Loader | None, batches: int) -> np.ndarray:
    """int64 [batches * B, seq_length + 1]"""
    assert loader is not None
    drawn = itertools.islice(loader, batches)
    return torch.cat([torch.cat([b.tokens_BS, b.labels_BS[:, -1:]], 1) for b in drawn]).numpy()


def test_batches_follow_the_order(tmp_path: Path) -> None:
    documents = write_dataset(tmp_path / "data", LENGTHS)
    loaders = build(tmp_path)
    # 6 steps and, after every second one and at the end, 4 evaluations; of 4 samples each
    assert np.array_equal(rows(loaders.train, 12), naive_order(documents, 0, 8, 24, 8, 7)[:24])
    assert np.array_equal(rows(loaders.valid, 8), naive_order(documents, 8, 9, 16, 8, 7)[:16])
    assert np.array_equal(rows(loaders.test, 2), naive_order(documents, 9, 10, 4, 8, 7)[:4])


def test_shapes_and_types(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    batch = next(build(tmp_path).train)
    assert isinstance(batch, Batch)
    assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.float32]
    assert all(x.shape == (2, 8) and x.is_contiguous() for x in batch)
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert batch.loss_mask_BS.all()


def test_end_of_document_inputs_are_masked_on_request(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [6] * 40)  # token 5 ends the first document
    loaders = build(tmp_path, eod_mask_loss=True, split="1")
    batches = list(itertools.islice(loaders.train, 12))
    assert any((batch.tokens_BS == EOD).any() for batch in batches)
    for batch in batches:
        assert torch.equal(batch.loss_mask_BS == 0, batch.tokens_BS == EOD)


@pytest.mark.parametrize("iteration", range(6))
def test_a_resumed_run_reads_on_where_it_was(tmp_path: Path, iteration: int) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    whole, rest = build(tmp_path), build(tmp_path, iteration)
    rows_left = rows(whole.train, 12)[iteration * 4 :]
    assert np.array_equal(rows(rest.train, 12 - 2 * iteration), rows_left)
    evaluations = iteration // 2
    valid_left = rows(whole.valid, 8)[evaluations * 4 :]
    assert np.array_equal(rows(rest.valid, 8 - 2 * evaluations), valid_left)
    assert np.array_equal(rows(rest.test, 2), rows(whole.test, 2))


def test_the_order_starts_over_after_its_end(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    count = len(naive_order([np.arange(50)], 0, 1, 4, 8, 7))
    assert count % 2 == 0
    drawn = rows(build(tmp_path).test, count)
    assert np.array_equal(drawn[:count], drawn[count:])


def read_on_a_grid(
    rank: int, folder: str, topology: Topology, shared_fs: bool
) -> tuple[np.ndarray, np.ndarray]:
    """As on two machines of two ranks, each with its own copy of the data."""
    os.environ["LOCAL_RANK"] = str(rank % 2)
    config = training_config(
        Path(folder) / f"machine{rank // 2}",
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        pipe_parallel_size=topology.pp,
        train_micro_batch_size_per_gpu=2 // topology.dp,
        num_layers=2,
        num_attention_heads=2,
        use_shared_fs=shared_fs,
    )
    groups = ProcessGroups(topology, rank, torch.device("cpu"))
    loaders = build_loaders(config, groups, 1, EOD)
    return rows(loaders.train, 6), rows(loaders.valid, 2)


@pytest.mark.parametrize(
    ("topology", "shared_fs"),
    [
        (Topology(pp=1, dp=2, tp=2), False),
        (Topology(pp=2, dp=2, tp=1), True),  # which is not true, and costs only time
    ],
)
def test_ranks_read_their_slices_of_one_order(
    world: World, tmp_path: Path, topology: Topology, shared_fs: bool
) -> None:
    for machine in ("machine0", "machine1"):
        (tmp_path / machine).mkdir()
        write_dataset(tmp_path / machine / "data", LENGTHS)
    ranks = world.run(4, read_on_a_grid, str(tmp_path), topology, shared_fs)
    alone = build(tmp_path / "machine0", iteration=1)
    for split, expected in enumerate((rows(alone.train, 6), rows(alone.valid, 2))):
        for rank, read in enumerate(ranks):
            # Batches of 2 in one process are batches of 1 on each of the two replicas.
            slice_of_each = expected[topology.coordinate(rank).dp :: 2]
            assert np.array_equal(read[split], slice_of_each)


def test_splits_without_iterations_or_documents(tmp_path: Path, capsys) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    loaders = build(tmp_path, eval_iters=0)
    assert (loaders.valid, loaders.test) == (None, None)
    assert capsys.readouterr().out.count("leaves none") == 0
    loaders = build(tmp_path, split="9,1")
    assert loaders.valid is not None
    assert loaders.test is None
    assert 'split "9,1" of 10 documents leaves none for test' in capsys.readouterr().out
    with pytest.raises(DataError, match="leaves none for train"):
        build(tmp_path, split="0,1,1")


def test_separate_datasets(tmp_path: Path) -> None:
    names = ["a", "b", "valid", "test"]
    for n, name in enumerate(names):
        write_dataset(tmp_path / name, [700], first=1000 * n)
    paths = {name: str(tmp_path / name) for name in names}
    loaders = build(
        tmp_path,
        data_path=None,
        split=None,
        train_data_paths=[paths["a"], paths["b"]],
        train_data_weights=[1.0, 2.0],
        valid_data_paths=[paths["valid"]],
        test_data_paths=[paths["test"]],
    )
    sources = rows(loaders.train, 12)[:, 0] // 1000
    assert np.bincount(sources).tolist() == [8, 16]
    assert set(rows(loaders.valid, 8)[:, 0] // 1000) == {2}
    assert set(rows(loaders.test, 2)[:, 0] // 1000) == {3}


def test_weights_of_zero_leave_a_dataset_out(tmp_path: Path) -> None:
    write_dataset(tmp_path / "b", [900], first=1000)
    paths = [str(tmp_path / "absent"), str(tmp_path / "b")]
    data = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    data |= {f"{split}_data_weights": [0.0, 2.0] for split in ("train", "valid", "test")}
    loaders = build(tmp_path, data_path=None, split=None, **data)
    assert rows(loaders.train, 12).min() >= 1000


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 18), (0.0, 12), (0.5, 15)])
def test_weights_by_document_count(tmp_path: Path, alpha: float, expected: int, capsys) -> None:
    write_dataset(tmp_path / "a", [5] * 90)  # three times the documents, and fewer tokens
    write_dataset(tmp_path / "b", [90] * 30, first=10000)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    data = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    loaders = build(
        tmp_path,
        data_path=None,
        split=None,
        weight_by_num_documents=True,
        weighted_sampler_alpha=alpha,
        **data,
    )
    from_a = (rows(loaders.train, 12)[:, 0] < 10000).sum()
    assert abs(from_a - expected) <= 1
    assert f"{paths[0]}, 90 documents, weight" in capsys.readouterr().out


def test_origins_of_a_rank(tmp_path: Path) -> None:
    texts = write_dataset(tmp_path / "data", LENGTHS)
    samples = build(tmp_path).train._samples
    for rank in range(3):
        loader = Loader(samples, batch_size=2, dp=3, dp_rank=rank, start=5, masked_token=None)
        for number in (0, 4, 17, 1000):
            batch = loader.read(number)
            for row, parts in enumerate(loader.origins(number)):
                tokens = np.concatenate([texts[p.document][p.start : p.stop] for p in parts])
                assert np.array_equal(tokens[:-1], batch.tokens_BS[row])
                assert np.array_equal(tokens[1:], batch.labels_BS[row])
        first = next(loader)
        assert torch.equal(first.tokens_BS, loader.read(5).tokens_BS)


class CountedSamples:
    """Samples whose tokens are their number; reading `bad` is an error."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.facts: dict = {}
        self.read: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, n: int) -> Sample:
        if n % 7 == 0:
            time.sleep(0.001)  # so that threads overtake one another
        self.threads.add(threading.current_thread().name)
        self.read.append(n)
        if n == self.bad:
            raise DataError(f"sample {n}")
        tokens = np.full(4, n)
        return Sample(tokens, tokens)

    def origins(self, n: int) -> list[Origin]:
        return []


def counted(workers: int, bad: int | None = None, start: int = 0) -> tuple[Loader, CountedSamples]:
    samples = CountedSamples(bad)
    kind = {"batch_size": 1, "dp": 1, "dp_rank": 0, "masked_token": None}
    return Loader(samples, start=start, workers=workers, **kind), samples


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_keep_the_order_and_read_no_further_than_they_may(workers: int) -> None:
    loader, samples = counted(workers, start=3)
    assert not samples.read  # nothing is read before the first batch is asked for
    for n in range(3, 103):
        assert next(loader).tokens_BS[0, 0] == n
        assert max(samples.read) <= n + 2 * workers
    assert len(samples.read) == len(set(samples.read))
    in_background = {name.startswith("neox-data") for name in samples.threads}
    assert in_background == {workers > 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_with_its_own_batch(workers: int) -> None:
    loader, _ = counted(workers, bad=4)
    for n in range(4):
        assert next(loader).tokens_BS[0, 0] == n
    with pytest.raises(DataError, match="sample 4"):
        next(loader)


def test_far_micro_batches_are_no_overflow() -> None:
    loader, _ = counted(0)
    assert loader.read(3 * 10**12 + 5).tokens_BS[0, 0] == 5


def test_memory_stays_flat_over_many_steps(tmp_path: Path) -> None:
    """Upstream's loader keeps every batch it ever made."""
    for name in ("a", "b"):
        lengths = np.random.default_rng(0).integers(1, 40, size=500).tolist()
        texts = write_dataset(tmp_path / name, lengths)
        write_labels(tmp_path / f"{name}_labels", texts, [np.arange(k) % 2 for k in lengths])
    paths = [str(tmp_path / name) for name in ("a", "b")]
    data = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    labels = [f"{path}_labels" for path in paths]
    loaders = build(
        tmp_path,
        data_path=None,
        split=None,
        train_label_data_paths=labels,
        pack_impl="pack_until_overflow",
        **data,
    )
    for _ in range(300):  # every page of the files is mapped by then
        next(loaders.train)
    gc.collect()
    tracemalloc.start()
    for _ in range(20):
        next(loaders.train)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(3000):
        next(loaders.train)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A batch is 2 x 8 x (8 + 8 + 4) bytes beside its tensors' 1,000: 3,000 kept would be megabytes.
    assert after - before < 50_000
    assert peak - before < 200_000


def test_the_first_rank_of_a_machine_reads_the_files_on_request(
    tmp_path: Path, monkeypatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr("neox.data.loaders.warm_up", read.append)
    write_dataset(tmp_path / "data", LENGTHS)
    build(tmp_path)
    assert read == []
    build(tmp_path, mmap_warmup=True)
    assert read == [str(tmp_path / "data")]
    monkeypatch.setenv("LOCAL_RANK", "1")
    build(tmp_path, mmap_warmup=True)
    assert len(read) == 1


def test_more_datasets_than_files_may_be_open(tmp_path: Path, monkeypatch) -> None:
    def open_no_more(*about: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("neox.data.loaders.open_documents", open_no_more)
    data = {f"{split}_data_paths": ["a", "b"] for split in ("train", "valid", "test")}
    with pytest.raises(DataError, match="2 datasets are more than a process may have open here"):
        build(tmp_path, data_path=None, split=None, **data)


def test_threads_end_with_their_loader() -> None:
    loader, _ = counted(3)
    next(loader)
    threads = [t for t in threading.enumerate() if t.name.startswith("neox-data")]
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
