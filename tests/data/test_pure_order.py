"""A step's samples follow from the data, the seed and seq_length: not from the grid or restarts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.data.loaders import Batch, Loader, build_loaders
from tests.data.datasets import Replica, training_config, write_dataset, write_labels

STEPS, BATCH = 6, 12
# Who reads the 12 samples of a step: (dp, micro-batch, accumulation).
GRIDS = [(1, 12, 1), (1, 1, 12), (2, 3, 2), (4, 3, 1), (3, 2, 2), (12, 1, 1)]
KINDS = ("packed", "pack_until_overflow", "unpacked", "blend", "counts", "labels", "epochs")


def make_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    for n, name in enumerate("abc"):
        lengths = random.integers(1, 30, size=40 * (n + 1)).tolist()
        texts = write_dataset(folder / name, lengths, first=5000 * n)
        flags = [random.integers(0, 2, size=length) for length in lengths]
        write_labels(folder / f"{name}_labels", texts, flags)


def config_of(folder: Path, kind: str, dp: int, micro: int, accumulation: int, **values):
    paths = [str(folder / name) for name in "abc"]
    data = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    data |= {"data_path": None, "split": None}
    labels = {f"{s}_label_data_paths": [f"{p}_labels" for p in paths] for s in ("train", "valid")}
    given = {
        "packed": {"data_path": paths[2], "split": "8,1,1"},
        "pack_until_overflow": {"data_path": paths[2], "pack_impl": "pack_until_overflow"},
        "unpacked": {"data_path": paths[2], "pack_impl": "unpacked", "split": "8,1,1"},
        "blend": data | {"train_data_weights": [0.2, 0.5, 0.3]},
        "counts": data | {"weight_by_num_documents": True, "weighted_sampler_alpha": 0.5},
        "labels": data | labels | {"pack_impl": "unpacked"},
        "epochs": {"data_path": paths[0], "split": "8,1,1"},
    }[kind]
    merged = {"train_iters": STEPS, "eod_mask_loss": True, **given, **values}
    config = training_config(
        folder,
        world_size=dp,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        **merged,
    )
    # As settle_iterations leaves it: the first steps of many.
    return dataclasses.replace(config, train_epochs=3) if kind == "epochs" else config


def step_rows(batches: list[Batch]) -> list[tuple]:
    """Tokens, labels and mask of each row, in no order."""
    stacked = [torch.cat(tensors).tolist() for tensors in zip(*batches, strict=True)]
    return sorted(zip(*stacked, strict=True))


def read(folder: Path, kind: str, grid: tuple[int, int, int], first: int, **values) -> dict:
    """The rows of every training step from `first` on, and of every validation from there on."""
    dp, micro, accumulation = grid
    config = config_of(folder, kind, dp, micro, accumulation, **values)
    ranks = []
    for rank in range(dp):
        ranks.append(build_loaders(config, Replica.of(rank, dp), first, 7))
    found = {}
    for split, count in (("train", STEPS - first), ("valid", 2)):
        loaders: list[Loader] = [getattr(loaders, split) for loaders in ranks]
        found[split] = []
        for _ in range(count):
            drawn = [list(itertools.islice(loader, accumulation)) for loader in loaders]
            found[split].append(step_rows([batch for batches in drawn for batch in batches]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_same_at_every_grid(tmp_path: Path, kind: str) -> None:
    make_data(tmp_path)
    expected = read(tmp_path, kind, GRIDS[0], 0)
    assert len({str(step) for step in expected["train"]}) == STEPS  # steps differ
    for grid in GRIDS[1:]:
        assert read(tmp_path, kind, grid, 0) == expected, grid


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_another_grid_reads_on(tmp_path: Path, kind: str) -> None:
    make_data(tmp_path)
    expected = read(tmp_path, kind, GRIDS[0], 0)
    for first, grid in ((1, GRIDS[1]), (2, GRIDS[2]), (3, GRIDS[5]), (5, GRIDS[4])):
        rest = read(tmp_path, kind, grid, first)
        assert rest["train"] == expected["train"][first:], (first, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_part_in_the_order(tmp_path: Path, kind: str) -> None:
    """Neither the cache, nor threads, nor where the data lies, nor tp and pp."""
    make_data(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    make_data(tmp_path / "elsewhere")
    expected = read(tmp_path, kind, GRIDS[2], 0)
    others = [{"num_workers": 0}, {"num_workers": 5}, {"mmap_warmup": True}, {}]
    for values in others:  # the last reads the cache of the one before
        assert read(tmp_path, kind, GRIDS[2], 0, **values) == expected, values
    assert read(tmp_path / "elsewhere", kind, GRIDS[2], 0) == expected
    # More steps, but no more epochs: the beginning is the same.
    more = read(tmp_path, kind, GRIDS[2], 0, train_iters=STEPS + 1, eval_interval=100)
    assert more["train"] == expected["train"]


@pytest.mark.parametrize("values", [{"seed": 8}, {"seq_length": 7}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has(tmp_path: Path, kind: str, values: dict) -> None:
    make_data(tmp_path)
    assert read(tmp_path, kind, GRIDS[0], 0) != read(tmp_path, kind, GRIDS[0], 0, **values)
