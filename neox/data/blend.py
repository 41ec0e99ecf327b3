"""Several datasets as one, in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neox.config import NeoXConfig
from neox.data.cache import Arrays, cached_arrays
from neox.data.indexed import build_blend_index, open_indexed
from neox.data.samples import PackedSamples, open_samples
from neox.parallel.groups import ProcessGroups

_BLEND_VERSION = 1
# Upstream asks each dataset for half a percent more samples than its weight calls for. The blend
# does not need them, but they decide how many epochs are shuffled together, so the order does.
_MARGIN = 1.005


class BlendedSamples:
    """Sample n is sample `index[n]` of dataset `dataset[n]`."""

    def __init__(
        self, datasets: Sequence[PackedSamples], dataset_N: np.ndarray, index_N: np.ndarray
    ) -> None:
        self._datasets = datasets
        self._dataset_N = dataset_N
        self._index_N = index_N

    def __len__(self) -> int:
        return len(self._dataset_N)

    def __getitem__(self, n: int) -> np.ndarray:
        """int64 [seq_length + 1]."""
        return self._datasets[self._dataset_N[n]][int(self._index_N[n])]


def open_blend(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    num_samples: int,
    config: NeoXConfig,
    groups: ProcessGroups,
    vocab_size: int | None,
) -> BlendedSamples:
    """`num_samples` samples of whole datasets, with equal weights if None are given.

    Collective over the world.
    """
    weights = [1.0] * len(prefixes) if weights is None else weights
    used = [(p, w / sum(weights)) for p, w in zip(prefixes, weights, strict=True) if w > 0]
    shares = np.array([weight for _, weight in used])
    shares /= shares.sum()

    def build() -> Arrays:
        return build_blend_index(shares, num_samples)

    key = {"version": _BLEND_VERSION, "weights": shares.tolist(), "samples": num_samples}
    first = used[0][0]
    dataset_N, index_N = cached_arrays(
        first, ("blend_dataset", "blend_index"), key, build, config, groups
    )
    drawn = np.bincount(dataset_N, minlength=len(used))
    datasets = []
    for (prefix, share), count in zip(used, drawn.tolist(), strict=True):
        indexed = open_indexed(prefix)
        wanted = max(math.ceil(num_samples * share * _MARGIN), count)
        documents = range(len(indexed))
        datasets.append(open_samples(indexed, documents, wanted, config, groups, vocab_size))
    return BlendedSamples(datasets, dataset_N, index_N)
