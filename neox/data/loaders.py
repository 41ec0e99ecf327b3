"""Micro-batches for each rank: a pure function of the data, the seed and the step.

Global micro-batch m is samples m * G to (m + 1) * G of the order, G = micro-batch size * dp, and
data-parallel rank r holds the r-th of its dp equal slices. Tensor- and pipeline-parallel ranks of
one replica read the same. There are no worker processes: a sample is a copy out of a memory map,
microseconds against a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from neox import log
from neox.config import NeoXConfig
from neox.data.blend import open_blend
from neox.data.indexed import open_indexed
from neox.data.samples import open_samples, split_documents
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups


class Batch(NamedTuple):
    """One rank's micro-batch: B sequences, S = seq_length."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64, the tokens one position later
    loss_mask_BS: Tensor  # float32, 1 where the label counts


class Samples(Protocol):
    """An order of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int) -> np.ndarray: ...  # int64 [seq_length + 1]


class Loader:
    """An endless iterator of this rank's micro-batches; the order starts over after its end."""

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        dp: int,
        dp_rank: int,
        start: int,
        masked_token: int | None,
    ) -> None:
        """`start`: micro-batches drawn before; `masked_token`: input whose label does not count."""
        self._samples = samples
        self._batch_size = batch_size
        self._dp = dp
        self._dp_rank = dp_rank
        self._next = start
        self._masked_token = masked_token

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = (self._next * self._dp + self._dp_rank) * self._batch_size
        self._next += 1
        numbers = range(first, first + self._batch_size)
        rows = np.stack([self._samples[n % len(self._samples)] for n in numbers])
        tokens_BT = torch.from_numpy(rows)
        tokens_BS, labels_BS = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        loss_mask_BS = torch.ones(tokens_BS.shape, dtype=torch.float32)
        if self._masked_token is not None:
            loss_mask_BS[tokens_BS == self._masked_token] = 0.0
        return Batch(tokens_BS, labels_BS, loss_mask_BS)


class Loaders(NamedTuple):
    """None where there is nothing to read: no iterations, or no documents in that split."""

    train: Loader | None
    valid: Loader | None
    test: Loader | None


def build_loaders(
    config: NeoXConfig,
    groups: ProcessGroups,
    iteration: int,
    eod: int,
    *,
    vocab_size: int | None = None,
) -> Loaders:
    """Training from `iteration` completed steps on, validation likewise, and test.

    An evaluation draws `eval_iters` * `gradient_accumulation_steps` micro-batches from each rank's
    loader; before `iteration` there was one every `eval_interval` steps. With `vocab_size`, token
    ids beyond it are a DataError. DataError too when files are missing or damaged, or the training
    split is empty. Collective over the world: rank 0 builds index caches while the others wait.
    """
    assert config.train_iters is not None, "the configuration of a training run has it"
    evaluations = config.train_iters // config.eval_interval + 1  # the last at the end of training
    steps = {
        "train": config.train_iters,
        "valid": evaluations * config.eval_iters,
        "test": config.eval_iters,
    }
    done = {
        "train": iteration,
        "valid": iteration // config.eval_interval * config.eval_iters,
        "test": 0,
    }
    num_samples = {name: n * config.train_batch_size for name, n in steps.items()}
    if config.train_data_paths:
        samples = _separate(config, groups, num_samples, vocab_size)
    else:
        samples = _split(config, groups, num_samples, vocab_size)
    loaders = {
        name: Loader(
            order,
            batch_size=config.train_micro_batch_size_per_gpu,
            dp=groups.dp,
            dp_rank=groups.dp_rank,
            start=done[name] * config.gradient_accumulation_steps,
            masked_token=eod if config.eod_mask_loss else None,
        )
        for name, order in samples.items()
    }
    return Loaders(loaders.get("train"), loaders.get("valid"), loaders.get("test"))


def _separate(
    config: NeoXConfig,
    groups: ProcessGroups,
    num_samples: dict[str, int],
    vocab_size: int | None,
) -> dict[str, Samples]:
    """Each split from its own datasets, `train_data_paths` and so on."""
    sources = {
        "train": (config.train_data_paths, config.train_data_weights),
        "valid": (config.valid_data_paths, config.valid_data_weights),
        "test": (config.test_data_paths, config.test_data_weights),
    }
    return {
        name: open_blend(paths, weights, num_samples[name], config, groups, vocab_size)
        for name, (paths, weights) in sources.items()
        if paths and num_samples[name] > 0
    }


def _split(
    config: NeoXConfig,
    groups: ProcessGroups,
    num_samples: dict[str, int],
    vocab_size: int | None,
) -> dict[str, Samples]:
    """Every split from a range of `data_path`'s documents."""
    assert config.data_path is not None, "the configuration of a training run names its data"
    indexed = open_indexed(config.data_path)
    ranges = split_documents(config.split, len(indexed))
    samples: dict[str, Samples] = {}
    for (name, wanted), documents in zip(num_samples.items(), ranges, strict=True):
        if wanted == 0:
            continue
        if documents:
            samples[name] = open_samples(indexed, documents, wanted, config, groups, vocab_size)
            continue
        empty = f'split "{config.split}" of {len(indexed)} documents leaves none for {name}'
        if name == "train":
            raise DataError(f"{empty}; change split or data_path")
        log.info(f"{empty}: no {name} losses")
    return samples
