"""Micro-batches for each rank: a pure function of the data, the seed and the step.

Global micro-batch m is samples m * G to (m + 1) * G of the order, G = micro-batch size * dp, and
data-parallel rank r holds the r-th of its dp equal slices. Tensor- and pipeline-parallel ranks of
one replica read the same. Threads read ahead: a sample is a copy out of a memory map, microseconds
against a training step, unless a disk or a network has to bring it first.
"""

from __future__ import annotations

import dataclasses
import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neox import log
from neox.config import NeoXConfig
from neox.data.blend import open_blend, weights_of_counts
from neox.data.cache import is_first_of_machine
from neox.data.documents import Documents, open_documents
from neox.data.indexed import allow_many_files, warm_up
from neox.data.order import split_documents
from neox.data.samples import Origin, Samples, open_samples
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

SPLITS = ("train", "valid", "test")


class Batch(NamedTuple):
    """One rank's micro-batch: B sequences, S = seq_length."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64, the tokens one position later; 0 where masked by the data
    loss_mask_BS: Tensor  # float32, 1 where the label counts


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
        workers: int = 0,
    ) -> None:
        """`start`: micro-batches drawn before; `masked_token`: input whose label does not count.

        `workers` threads keep two micro-batches each ready; 0 reads when asked.
        """
        self._samples = samples
        self._batch_size = batch_size
        self._dp = dp
        self._dp_rank = dp_rank
        self._next = start
        self._masked_token = masked_token
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Batch]] = deque()

    @property
    def facts(self) -> dict[str, Any]:
        """What the order of samples follows from."""
        return self._samples.facts

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        micro_batch = self._next
        self._next += 1
        if not self._workers:
            return self.read(micro_batch)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="neox-data")
        for n in range(len(self._ahead), 2 * self._workers + 1):
            self._ahead.append(self._pool.submit(self.read, micro_batch + n))
        return self._ahead.popleft().result()

    def read(self, micro_batch: int) -> Batch:
        """The micro-batch of any number, counted from 0 at the beginning of training."""
        samples = [self._samples[n] for n in self._numbers(micro_batch)]
        tokens_BT = torch.from_numpy(np.stack([sample.tokens_T for sample in samples]))
        labels_BT = torch.from_numpy(np.stack([sample.labels_T for sample in samples]))
        tokens_BS, labels_BS = tokens_BT[:, :-1].contiguous(), labels_BT[:, 1:].contiguous()
        counts_BS = labels_BS >= 0
        if self._masked_token is not None:
            counts_BS &= tokens_BS != self._masked_token
        return Batch(tokens_BS, labels_BS.clamp_(min=0), counts_BS.float())

    def origins(self, micro_batch: int) -> list[list[Origin]]:
        """Where the tokens of each row of `read(micro_batch)` come from."""
        return [self._samples.origins(n) for n in self._numbers(micro_batch)]

    def _numbers(self, micro_batch: int) -> list[int]:
        first = (micro_batch * self._dp + self._dp_rank) * self._batch_size
        return [n % len(self._samples) for n in range(first, first + self._batch_size)]


class Loaders(NamedTuple):
    """None where there is nothing to read: no iterations, or no documents in that split."""

    train: Loader | None
    valid: Loader | None
    test: Loader | None


def settle_iterations(
    config: NeoXConfig, groups: ProcessGroups, *, vocab_size: int | None = None
) -> NeoXConfig:
    """With `train_iters` as it follows from `train_epochs`, if that is given.

    As many whole steps as there are without reading a sample more than `train_epochs` times.
    Collective over the world; DataError when there is not one step.
    """
    if config.train_epochs is None:
        return config
    once = dataclasses.replace(config, mmap_warmup=False)  # build_loaders will
    samples = _open(once, groups, {"train": None}, vocab_size)["train"]
    iterations = len(samples) * config.train_epochs // config.train_batch_size
    if iterations == 0:
        raise DataError(
            f"train_epochs ({config.train_epochs}) of {len(samples)} samples do not fill one batch "
            f"of train_batch_size ({config.train_batch_size}): use a smaller batch or more epochs"
        )
    log.info(
        f"train_epochs {config.train_epochs}: train_iters {iterations} = {len(samples)} samples x "
        f"{config.train_epochs} / train_batch_size {config.train_batch_size}"
    )
    origins = {**config.origins, "train_iters": "derived"}
    return dataclasses.replace(config, train_iters=iterations, origins=origins)


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
    assert config.train_iters is not None, "settle_iterations sees to it"
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
    wanted: dict[str, int | None]
    wanted = {name: n * config.train_batch_size for name, n in steps.items() if n}
    if config.train_epochs is not None:
        wanted["train"] = None
    samples = _open(config, groups, wanted, vocab_size)
    loaders = {
        name: Loader(
            order,
            batch_size=config.train_micro_batch_size_per_gpu,
            dp=groups.dp,
            dp_rank=groups.dp_rank,
            start=done[name] * config.gradient_accumulation_steps,
            masked_token=eod if config.eod_mask_loss else None,
            workers=config.num_workers,
        )
        for name, order in samples.items()
    }
    return Loaders(loaders.get("train"), loaders.get("valid"), loaders.get("test"))


def _open(
    config: NeoXConfig,
    groups: ProcessGroups,
    wanted: dict[str, int | None],
    vocab_size: int | None,
) -> dict[str, Samples]:
    """The splits in `wanted`, each with that many samples, or None: every document once."""
    if config.train_data_paths:
        return _separate(config, groups, wanted, vocab_size)
    return _split(config, groups, wanted, vocab_size)


def _separate(
    config: NeoXConfig,
    groups: ProcessGroups,
    wanted: dict[str, int | None],
    vocab_size: int | None,
) -> dict[str, Samples]:
    """Each split from its own datasets, `train_data_paths` and so on."""
    samples: dict[str, Samples] = {}
    for name, count in wanted.items():
        paths = getattr(config, f"{name}_data_paths") or []
        if not paths:
            continue
        labels = getattr(config, f"{name}_label_data_paths") or [None] * len(paths)
        weights = getattr(config, f"{name}_data_weights") or [1.0] * len(paths)
        chosen = [
            (path, label, weight)
            for path, label, weight in zip(paths, labels, weights, strict=True)
            if weight > 0 or config.weight_by_num_documents
        ]
        datasets = _read_all(chosen, config, vocab_size)
        weights = [weight for _, _, weight in chosen]
        if config.weight_by_num_documents:
            counts = [len(dataset) for dataset in datasets]
            weights = weights_of_counts(counts, config.weighted_sampler_alpha)
            for dataset, weight in zip(datasets, weights, strict=True):
                log.info(f"{name}: {dataset.prefix}, {len(dataset)} documents, weight {weight:.4g}")
        samples[name] = open_blend(datasets, weights, count, config, groups)
    return samples


def _split(
    config: NeoXConfig,
    groups: ProcessGroups,
    wanted: dict[str, int | None],
    vocab_size: int | None,
) -> dict[str, Samples]:
    """Every split from a range of `data_path`'s documents."""
    assert config.data_path is not None, "the configuration of a training run names its data"
    documents = _read(config.data_path, None, config, vocab_size)
    ranges = dict(zip(SPLITS, split_documents(config.split, len(documents)), strict=True))
    samples: dict[str, Samples] = {}
    for name, count in wanted.items():
        if ranges[name]:
            samples[name] = open_samples(documents, ranges[name], count, config, groups)
            continue
        empty = f'split "{config.split}" of {len(documents)} documents leaves none for {name}'
        if name == "train":
            raise DataError(f"{empty}; change split or data_path")
        log.info(f"{empty}: no {name} losses")
    return samples


def _read_all(
    chosen: list[tuple[str, str | None, float]], config: NeoXConfig, vocab_size: int | None
) -> list[Documents]:
    """Datasets stay open, two files each and two more of their order, so there may be thousands."""
    hard = allow_many_files()
    try:
        return [_read(path, label, config, vocab_size) for path, label, _ in chosen]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise DataError(
            f"{len(chosen)} datasets are more than a process may have open here ({hard} files): "
            "merge some with tools/data.py, or raise the limit (ulimit -n)"
        ) from None


def _read(path: str, labels: str | None, config: NeoXConfig, vocab_size: int | None) -> Documents:
    documents = open_documents(path, labels, vocab_size)
    if config.mmap_warmup and is_first_of_machine():
        for prefix in filter(None, (path, labels)):
            warm_up(prefix)
    return documents
