"""Several datasets as one, in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from neox.config import NeoXConfig
from neox.data.blending import build_blend_index, build_whole_blend_index
from neox.data.cache import Arrays, cached_arrays
from neox.data.documents import Documents, Sample
from neox.data.samples import Origin, Samples, open_samples
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

_BLEND_VERSION = 2
_MOST_DATASETS = 2**15 - 1  # their numbers are int16
# Upstream asks each dataset for half a percent more samples than its weight calls for. The blend
# does not need them, but they decide how many epochs are shuffled together, so the order does.
_MARGIN = 1.005


class BlendedSamples:
    """Sample n is sample `index[n]` of dataset `dataset[n]`."""

    def __init__(
        self,
        datasets: Sequence[Samples],
        weights: list[float],
        dataset_N: np.ndarray,
        index_N: np.ndarray,
    ) -> None:
        self._datasets = datasets
        self._dataset_N = dataset_N
        self._index_N = index_N
        self.facts = {"weights": weights, "datasets": [samples.facts for samples in datasets]}

    def __len__(self) -> int:
        return len(self._dataset_N)

    def __getitem__(self, n: int) -> Sample:
        return self._datasets[self._dataset_N[n]][int(self._index_N[n])]

    def origins(self, n: int) -> list[Origin]:
        return self._datasets[self._dataset_N[n]].origins(int(self._index_N[n]))


def open_blend(
    datasets: Sequence[Documents],
    weights: Sequence[float] | None,
    num_samples: int | None,
    config: NeoXConfig,
    groups: ProcessGroups,
) -> BlendedSamples:
    """`num_samples` samples of whole datasets, with equal weights if None are given, all above 0.

    With `num_samples` None every dataset's documents are read once, whatever the weights.
    Collective over the world. DataError when a dataset has no samples.
    """
    if len(datasets) > _MOST_DATASETS:
        raise DataError(
            f"{len(datasets)} datasets are too many to blend: merge some with tools/data.py, there "
            f"may be {_MOST_DATASETS}"
        )
    if num_samples is None:
        return _all_once(datasets, config, groups)
    weights = [1.0] * len(datasets) if weights is None else weights
    total = sum(weights)
    shares = np.array([weight / total for weight in weights])
    shares /= shares.sum()  # twice, as upstream does: the last bit may decide who is ahead

    def build() -> Arrays:
        return build_blend_index(shares, num_samples)

    key = {"version": _BLEND_VERSION, "weights": shares.tolist(), "samples": num_samples}
    dataset_N, index_N = _cached(datasets[0], key, build, config, groups)
    drawn = np.bincount(dataset_N, minlength=len(datasets))
    opened = []
    for documents, share, count in zip(datasets, shares, drawn.tolist(), strict=True):
        wanted = max(math.ceil(num_samples * share * _MARGIN), count)
        opened.append(open_samples(documents, range(len(documents)), wanted, config, groups))
    return BlendedSamples(opened, shares.tolist(), dataset_N, index_N)


def _all_once(
    datasets: Sequence[Documents], config: NeoXConfig, groups: ProcessGroups
) -> BlendedSamples:
    """An epoch: each sample of each dataset, in proportion to how many there are."""
    opened = [open_samples(d, range(len(d)), None, config, groups) for d in datasets]
    sizes = np.array([len(samples) for samples in opened], dtype=np.int64)

    def build() -> Arrays:
        return build_whole_blend_index(sizes)

    key = {"version": _BLEND_VERSION, "sizes": sizes.tolist()}
    dataset_N, index_N = _cached(datasets[0], key, build, config, groups)
    return BlendedSamples(opened, [1.0] * len(opened), dataset_N, index_N)


def _cached(
    first: Documents,
    key: dict[str, Any],
    build: Callable[[], Arrays],
    config: NeoXConfig,
    groups: ProcessGroups,
) -> Arrays:
    names = ("blend_dataset", "blend_index")
    return cached_arrays(first.prefix, names, key, build, config, groups)


def weights_of_counts(counts: Sequence[int], alpha: float) -> list[float]:
    """n ** alpha / the sum of all: what upstream's documentation says, though not its code.

    alpha 1 draws in proportion to the documents, 0 from all datasets alike.
    """
    largest = max(counts)  # divided by, so that no power overflows
    powers = [(count / largest) ** alpha for count in counts]
    return [power / math.fsum(powers) for power in powers]
