"""Which tokens the n-th training sample holds: upstream's order, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neox import log
from neox.config import NeoXConfig
from neox.data.cache import Arrays, cached_arrays
from neox.data.indexed import build_sample_index, idx_path
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# Part of the cache's key: raise it when the order or the files' meaning changes.
_ORDER_VERSION = 1


class PackedSamples:
    """Samples of `seq_length` + 1 consecutive tokens from a shuffled stream of documents.

    Consecutive samples of the stream share one token, the last of one being the first of the next:
    each token is a label once. The samples are then shuffled.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: np.ndarray,
        starts_N2: np.ndarray,
        seq_length: int,
        vocab_size: int | None,
    ) -> None:
        self._indexed = indexed
        self._documents = documents
        self._starts_N2 = starts_N2
        self._seq_length = seq_length
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self._starts_N2)

    def __getitem__(self, n: int) -> np.ndarray:
        """int64 [seq_length + 1]. DataError when an id is outside the vocabulary."""
        sample = np.empty(self._seq_length + 1, dtype=np.int64)
        position, offset = self._starts_N2[n].tolist()
        filled = 0
        while filled < len(sample):
            part = self._indexed.get(int(self._documents[position]), offset)
            part = part[: len(sample) - filled]
            sample[filled : filled + len(part)] = part
            filled += len(part)
            position, offset = position + 1, 0
        if self._vocab_size is not None and sample.max() >= self._vocab_size:
            raise DataError(
                f"{self._indexed.path_prefix} holds token id {sample.max()} but the tokenizer's "
                f"vocabulary ends at {self._vocab_size - 1}: the data was made with another "
                "tokenizer; set vocab_file to that one, or tokenize the data again"
            )
        return sample


def split_documents(split: str, count: int) -> list[range]:
    """The documents of train, validation and test: `count` divided as `split`, "969, 30, 1", says.

    Each share is rounded for itself, and train takes what that leaves over or short.
    """
    shares = [float(share) for share in split.replace("/", ",").split(",")]
    shares = [*shares, 0.0, 0.0][:3]
    counts = [round(share / sum(shares) * count) for share in shares]
    ends = [sum(counts[: i + 1]) for i in range(3)]
    ends = [max(0, end - (ends[2] - count)) for end in ends]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def open_samples(
    indexed: IndexedDataset,
    documents: range,
    num_samples: int,
    config: NeoXConfig,
    groups: ProcessGroups,
    vocab_size: int | None,
) -> PackedSamples:
    """At least `num_samples` samples of some documents of a dataset. Collective over the world.

    DataError when these documents have no tokens.
    """
    prefix = indexed.path_prefix
    tokens = int(indexed.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(
            f"documents {documents.start} to {documents.stop - 1} of {prefix} have no tokens"
        )
    epochs = epochs_needed(tokens, config.seq_length, num_samples)

    def build() -> Arrays:
        log.info(f"shuffling {len(documents)} documents of {prefix}, epochs: {epochs} ...")
        lengths = indexed.sequence_lengths
        return build_order(lengths, documents, config.seq_length, epochs, config.seed)

    file = idx_path(prefix).stat()
    key = {
        "version": _ORDER_VERSION,
        "index": [file.st_size, file.st_mtime_ns],
        "documents": [documents.start, documents.stop],
        "seq_length": config.seq_length,
        "seed": config.seed,
        "epochs": epochs,
    }
    names = ("documents", "starts")
    stream, starts_N2 = cached_arrays(prefix, names, key, build, config, groups)
    return PackedSamples(indexed, stream, starts_N2, config.seq_length, vocab_size)


def epochs_needed(tokens: int, seq_length: int, num_samples: int) -> int:
    """The smallest e >= 1 with (e * tokens - 1) // seq_length >= num_samples.

    n samples take n * seq_length + 1 tokens, because neighbours share one.
    """
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def build_order(
    lengths: np.ndarray, documents: range, seq_length: int, epochs: int, seed: int
) -> Arrays:
    """(documents int32 [epochs * len(documents)], starts int32 or int64 [samples, 2]).

    One generator shuffles first the documents, all epochs together, and then the samples.
    """
    random = np.random.RandomState(seed)
    stream = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
    random.shuffle(stream)
    tokens = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    starts = build_sample_index(lengths, stream, seq_length, epochs, tokens)[:-1]
    order = np.arange(len(starts), dtype=np.uint32 if len(starts) < 2**32 - 1 else np.int64)
    random.shuffle(order)
    return stream, starts[order]
