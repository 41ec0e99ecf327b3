"""The documents of a dataset as training reads them: token ids, and which of them are labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from neox.data.indexed import IndexedDataset, bin_path, fingerprint, idx_path, open_indexed
from neox.errors import DataError

MASKED = -100  # the label of a token that is not to be learnt, as label datasets have it
_PADDING = 0  # the id upstream fills samples up with; its label is masked
_MOST_DOCUMENTS = 2**31 - 1  # document numbers are int32 in the order
_CHUNK = 1 << 22


class Sample(NamedTuple):
    """T = seq_length + 1 tokens. The label of position t is labels_T[t + 1]; negative: masked."""

    tokens_T: np.ndarray  # int64
    labels_T: np.ndarray  # int64, the tokens themselves where nothing is masked


class Documents:
    """A dataset and its labels, if it has any; read only, from any thread."""

    def __init__(
        self, text: IndexedDataset, labels: IndexedDataset | None, vocab_size: int | None
    ) -> None:
        self.prefix = text.path_prefix
        self.lengths = text.sequence_lengths  # int32
        self._text = text
        self._labels = labels
        self._vocab_size = vocab_size
        self.content = fingerprint(self.prefix)
        self.labels_content = None if labels is None else fingerprint(labels.path_prefix)
        both = [text] if labels is None else [text, labels]
        # Sizes and ages of the files; `content` is of samples of them.
        self.files = [
            [stat.st_size, stat.st_mtime_ns]
            for dataset in both
            for stat in (idx_path(dataset.path_prefix).stat(), bin_path(dataset.path_prefix).stat())
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    def read(self, parts: Iterable[tuple[int, int, int]], size: int) -> Sample:
        """(document, start, stop) parts end to end, at most `size` tokens, padded to `size`.

        DataError when an id is outside the vocabulary.
        """
        tokens = np.full(size, _PADDING, dtype=np.int64)
        labels = np.full(size, MASKED, dtype=np.int64)
        filled = 0
        for document, start, stop in parts:
            end = filled + stop - start
            tokens[filled:end] = self._text.get(document, start, stop - start)
            self._check(self._text, tokens[filled:end], document, 0)
            if self._labels is None:
                labels[filled:end] = tokens[filled:end]
            else:
                labels[filled:end] = self._labels.get(document, start, stop - start)
                self._check(self._labels, labels[filled:end], document, MASKED)
            filled = end
        return Sample(tokens, labels)

    def _check(self, dataset: IndexedDataset, ids: np.ndarray, document: int, lowest: int) -> None:
        where = f"document {document} of {dataset.path_prefix}"
        if ids.min() < lowest:
            what = f"labels are token ids or {MASKED}"
            if lowest == 0:
                what = "if these are labels, name them in train_label_data_paths (valid_, test_)"
            raise DataError(f"{where} holds the id {ids.min()}: {what}")
        if self._vocab_size is not None and ids.max() >= self._vocab_size:
            advice = "set vocab_file to that one, or tokenize the data again"
            if dataset is self._labels and ids.max() == 2**16 + MASKED:
                advice = f"or that is {MASKED} stored in 16 bits, where labels take int32"
            raise DataError(
                f"{where} holds token id {ids.max()} but the tokenizer's vocabulary ends at "
                f"{self._vocab_size - 1}: the data was made with another tokenizer; {advice}"
            )

    def count_labels(self, chosen: range, room: int) -> np.ndarray:
        """int64, for each of the documents: how many of their first `room` labels count.

        The first token's never does: nothing comes before it.
        """
        assert self._labels is not None
        counts = np.zeros(len(chosen), dtype=np.int64)
        itemsize = self._labels.dtype.itemsize
        starts = self._labels.sequence_offsets[chosen.start : chosen.stop] // itemsize
        stops = starts + self.lengths[chosen.start : chosen.stop]
        first = 0
        while first < len(chosen):
            # As many documents as fit into a chunk, or one that is longer.
            end = max(first + 1, int(np.searchsorted(stops, starts[first] + _CHUNK)))
            base = starts[first]
            flags = self._labels.span(int(base), int(stops[end - 1])) >= 0
            sums = np.zeros(len(flags) + 1, dtype=np.int64)
            np.cumsum(flags, out=sums[1:])
            low = np.minimum(starts[first:end] + 1, stops[first:end]) - base
            high = np.minimum(starts[first:end] + room, stops[first:end]) - base
            counts[first:end] = sums[high] - sums[low]
            first = end
        return counts


def open_documents(
    prefix: str, label_prefix: str | None = None, vocab_size: int | None = None
) -> Documents:
    """Open a dataset, with its labels. DataError when a file is missing or damaged, or the labels
    are not of the same documents and lengths."""
    text = open_indexed(prefix)
    if len(text) > _MOST_DOCUMENTS:
        raise DataError(
            f"{prefix} has {len(text)} documents; a dataset has at most {_MOST_DOCUMENTS}: divide "
            "it, and name the parts in train_data_paths"
        )
    if label_prefix is None:
        return Documents(text, None, vocab_size)
    labels = open_indexed(label_prefix)
    check_parallel(text, labels)
    return Documents(text, labels, vocab_size)


def check_parallel(text: IndexedDataset, labels: IndexedDataset) -> None:
    """DataError unless there is one label for each token."""
    if len(text) != len(labels):
        raise DataError(
            f"the labels {labels.path_prefix} are of {len(labels)} documents, the text "
            f"{text.path_prefix} has {len(text)}: they were not made together"
        )
    different = np.flatnonzero(text.sequence_lengths != labels.sequence_lengths)
    if len(different):
        n = int(different[0])
        raise DataError(
            f"document {n} has {labels.sequence_lengths[n]} labels in {labels.path_prefix}, but "
            f"{text.sequence_lengths[n]} tokens in {text.path_prefix}"
            f"{f', and {len(different) - 1} more differ' * (len(different) > 1)}: they were not "
            "made together"
        )
