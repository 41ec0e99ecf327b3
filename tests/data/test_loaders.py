from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.data.loaders import Batch, Loader, Loaders, build_loaders
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from tests.data.datasets import naive_order, training_config, write_dataset
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
