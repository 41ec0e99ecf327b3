"""What is in a dataset, counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neox import log
from neox.data.indexed import open_indexed

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_CHUNK = 1 << 22  # tokens


class Counts(NamedTuple):
    """Of one dataset; lengths are in tokens, a document each."""

    prefix: str
    dtype: str
    documents: int
    empty: int
    tokens: int
    shortest: int
    longest: int
    percentiles: dict[int, int]
    largest_id: int
    masked: int  # negative ids: what a label dataset leaves out of the loss


def count(prefix: str) -> Counts:
    """Reads all of the dataset, in pieces. DataError when it is missing or damaged."""
    dataset = open_indexed(prefix)
    lengths = np.sort(dataset.sequence_lengths)
    # The smallest length that this share of the documents does not exceed.
    places = {p: max(0, -(-p * len(lengths) // 100) - 1) for p in PERCENTILES}
    largest, masked = -1, 0
    with log.progress(total=dataset.tokens, desc=f"reading {prefix}", unit=" tokens") as bar:
        for start in range(0, dataset.tokens, _CHUNK):
            ids = dataset.span(start, min(start + _CHUNK, dataset.tokens))
            largest = max(largest, int(ids.max()))
            masked += int((ids < 0).sum())
            bar.update(len(ids))
    return Counts(
        prefix,
        str(dataset.dtype),
        len(lengths),
        int((lengths == 0).sum()),
        dataset.tokens,
        int(lengths[0]),
        int(lengths[-1]),
        {p: int(lengths[place]) for p, place in places.items()},
        largest,
        masked,
    )
