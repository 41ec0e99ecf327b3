"""Which tokens the n-th sample of a dataset holds, which of them are labels, and whence they come.

`pack_impl` says how documents become samples of seq_length + 1 tokens: `packed` cuts one stream of
all documents, upstream's order bit for bit; the other two keep documents in one piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from neox import log
from neox.config import NeoXConfig
from neox.data.cache import Arrays, cached_arrays
from neox.data.documents import Documents, Sample
from neox.data.indexed import idx_path
from neox.data.order import epochs_needed, stream_order, whole_order
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups

# Part of the caches' keys: raise it when the order or the files' meaning changes.
ORDER_VERSION = 2
_LONGEST_STREAM = 2**31  # documents; ordering them takes 16 bytes each


class Origin(NamedTuple):
    """A part of a sample: tokens `start` to `stop` of a document."""

    prefix: str  # the dataset
    document: int
    start: int
    stop: int


class Samples(Protocol):
    """An order of samples."""

    facts: dict[str, Any]  # what the order follows from, apart from the configuration

    def __len__(self) -> int: ...

    def __getitem__(self, n: int) -> Sample: ...

    def origins(self, n: int) -> list[Origin]: ...


class _OneDataset(ABC):
    """What the two below share: a sample is its parts end to end."""

    def __init__(
        self,
        documents: Documents,
        seq_length: int,
        facts: dict[str, Any],
        stream: np.ndarray,
        bounds: np.ndarray,
    ) -> None:
        """`stream`: documents in order; `bounds`: where in it each sample begins."""
        self._documents = documents
        self._room = seq_length + 1
        self.facts = facts
        self._stream = stream
        self._bounds = bounds

    def __getitem__(self, n: int) -> Sample:
        """DataError when an id is outside the vocabulary."""
        return self._documents.read(self._parts(n), self._room)

    def origins(self, n: int) -> list[Origin]:
        """The parts of sample n, in order."""
        return [Origin(self._documents.prefix, *part) for part in self._parts(n)]

    @abstractmethod
    def _parts(self, n: int) -> Iterator[tuple[int, int, int]]:
        """(document, start, stop) of each part."""


class StreamSamples(_OneDataset):
    """`packed`: consecutive tokens of a shuffled stream of documents.

    Consecutive samples of the stream share one token, the last of one being the first of the next:
    each token is a label once. The samples are then shuffled. A row of `bounds` is (position in the
    stream, token of that document).
    """

    def __len__(self) -> int:
        return len(self._bounds)

    def _parts(self, n: int) -> Iterator[tuple[int, int, int]]:
        position, start = self._bounds[n].tolist()
        missing = self._room
        while missing:
            document = int(self._stream[position])
            stop = min(int(self._documents.lengths[document]), start + missing)
            if stop > start:
                yield document, start, stop
            missing -= stop - start
            position, start = position + 1, 0


class WholeSamples(_OneDataset):
    """`pack_until_overflow` and `unpacked`: documents from their beginning, then padding.

    Documents are cut at their end where a single one is longer than a sample. `bounds` ends with
    the end of the last sample.
    """

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _parts(self, n: int) -> Iterator[tuple[int, int, int]]:
        first, end = self._bounds[n : n + 2].tolist()
        for document in self._stream[first:end].tolist():
            yield document, 0, min(int(self._documents.lengths[document]), self._room)


def open_samples(
    documents: Documents,
    chosen: range,
    num_samples: int | None,
    config: NeoXConfig,
    groups: ProcessGroups,
) -> Samples:
    """At least `num_samples` samples of the `chosen` documents; None: of each of them once.

    Collective over the world. DataError when these documents make no sample.
    """
    if documents.lengths[chosen.start : chosen.stop].min(initial=0) < 0:
        raise DataError(
            f"{idx_path(documents.prefix)} has a document of less than no tokens: it is damaged; "
            "tokenize the corpus again"
        )
    content = {
        "text": documents.content,
        "labels": documents.labels_content,
        "documents": [chosen.start, chosen.stop],
    }
    key = {
        "version": ORDER_VERSION,
        "files": documents.files,
        "content": content,
        "seq_length": config.seq_length,
        "seed": config.seed,
        "pack_impl": config.pack_impl,
    }
    if config.pack_impl == "packed":
        return _open_stream(documents, chosen, num_samples, key, config, groups)

    def build() -> Arrays:
        log.info(f"ordering {len(chosen)} documents of {documents.prefix} ...")
        usable = _usable(documents, chosen, config)
        joined = config.pack_impl == "pack_until_overflow"
        room = config.seq_length + 1
        return whole_order(
            documents.lengths, usable, room, num_samples or 0, config.seed, joined=joined
        )

    key |= {"samples": num_samples, "allow_chopped": config.allow_chopped}
    names = ("documents", "bounds")
    stream, bounds = cached_arrays(documents.prefix, names, key, build, config, groups)
    return WholeSamples(documents, config.seq_length, content, stream, bounds)


def _open_stream(
    documents: Documents,
    chosen: range,
    num_samples: int | None,
    key: dict[str, Any],
    config: NeoXConfig,
    groups: ProcessGroups,
) -> StreamSamples:
    prefix = documents.prefix
    tokens = int(documents.lengths[chosen.start : chosen.stop].sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(f"documents {chosen.start} to {chosen.stop - 1} of {prefix} have no tokens")
    if tokens <= config.seq_length:
        short = (
            f"documents {chosen.start} to {chosen.stop - 1} of {prefix} have {tokens} tokens, but "
            f"a sample takes seq_length + 1 = {config.seq_length + 1}"
        )
        if num_samples is None:
            raise DataError(
                f"{short}: there is not one sample in an epoch. Shorten seq_length, or say "
                "train_iters, which repeats documents within a sample"
            )
        log.warning(f"{short}: the same documents are repeated within each sample")
    epochs = 1 if num_samples is None else epochs_needed(tokens, config.seq_length, num_samples)
    if epochs * len(chosen) > _LONGEST_STREAM:
        raise DataError(
            f"{num_samples} samples are {epochs} epochs of documents {chosen.start} to "
            f"{chosen.stop - 1} of {prefix}, which have {tokens} tokens: more than can be ordered "
            "in memory. Give it more data, or fewer samples (train_iters, eval_iters)"
        )

    def build() -> Arrays:
        log.info(f"shuffling {len(chosen)} documents of {prefix}, epochs: {epochs} ...")
        return stream_order(documents.lengths, chosen, config.seq_length, epochs, config.seed)

    names = ("documents", "starts")
    key = key | {"epochs": epochs}
    stream, starts_N2 = cached_arrays(prefix, names, key, build, config, groups)
    facts = key["content"] | {"epochs": epochs}
    return StreamSamples(documents, config.seq_length, facts, stream, starts_N2)


def _usable(documents: Documents, chosen: range, config: NeoXConfig) -> np.ndarray:
    """int32: the documents that make a sample by themselves. DataError when there are none."""
    room = config.seq_length + 1
    lengths = documents.lengths[chosen.start : chosen.stop]
    keep = lengths >= 2
    why = {"shorter than 2 tokens": ~keep}
    if not config.allow_chopped:
        why[f"longer than seq_length + 1 = {room} tokens (allow_chopped: false)"] = lengths > room
        keep = keep & (lengths <= room)
    if documents.has_labels:
        counts = documents.count_labels(chosen, room)
        why["without a label that counts"] = keep & (counts == 0)
        keep = keep & (counts > 0)
    dropped = ", ".join(f"{int(which.sum())} {what}" for what, which in why.items() if which.any())
    if not keep.any():
        raise DataError(
            f"documents {chosen.start} to {chosen.stop - 1} of {documents.prefix} make no sample "
            f"with pack_impl: {config.pack_impl}: {dropped}"
        )
    if dropped:
        log.info(f"{documents.prefix}: left out {dropped}, of {len(chosen)} documents")
    return np.flatnonzero(keep).astype(np.int32) + np.int32(chosen.start)
