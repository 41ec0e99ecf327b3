"""Several datasets made one file, with their labels beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neox import log
from neox.data.documents import check_parallel
from neox.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    allow_many_files,
    bin_path,
    idx_path,
    open_indexed,
)
from neox.errors import DataError

_CHUNK = 1 << 22  # tokens
_DOCUMENT = "_document"  # how the preprocessing ends its prefixes


class Merged(NamedTuple):
    """What was written: prefixes and their counts."""

    prefix: str
    labels: str | None
    documents: int
    tokens: int


def merge(inputs: Sequence[str], output: str) -> Merged:
    """Write the documents of all `inputs` to `output`, in that order; labels too if all have them.

    An input is a prefix, or a folder: every dataset in it, by name. Streams; the files appear when
    they are whole. DataError when the inputs don't go together, or the disk is full.
    """
    prefixes = [prefix for path in inputs for prefix in _prefixes(path)]
    siblings = {label for prefix in prefixes for label in _label_names(prefix)}
    prefixes = [prefix for prefix in prefixes if prefix not in siblings]
    labels = [_labels_of(prefix) for prefix in prefixes]
    with_labels = any(labels)
    if with_labels and not all(labels):
        which = prefixes[labels.index(None)]
        raise DataError(
            f"{which} has no labels beside it (such as {_label_names(which)[0]}), but "
            f"{next(filter(None, labels))} is there: merge datasets with labels and without "
            "separately"
        )
    output_labels = _label_names(output)[-1] if with_labels else None
    for written in filter(None, (output, output_labels)):
        if any(_same(written, prefix) for prefix in (*prefixes, *filter(None, labels))):
            raise DataError(f"{written} is one of the datasets to merge; write to another prefix")
    allow_many_files()
    texts = [open_indexed(prefix) for prefix in prefixes]
    opened = [open_indexed(label) for label in labels if label]
    for text, label in zip(texts, opened, strict=False):
        check_parallel(text, label)
    total = sum(dataset.tokens * dataset.dtype.itemsize for dataset in (*texts, *opened))
    try:
        with (
            ExitStack() as files,
            log.progress(total=total, desc=f"merging {len(texts)} datasets", unit="B") as bar,
        ):
            # All files are put in place together, behind the last byte of the last.
            for path, datasets in ((output, texts), (output_labels, opened)):
                if path is not None:
                    writer = IndexedWriter(path, dtype=_common_dtype(datasets))
                    _copy(datasets, files.enter_context(writer), bar)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from None
    tokens = sum(dataset.tokens for dataset in texts)
    return Merged(output, output_labels, sum(map(len, texts)), tokens)


def _prefixes(path: str) -> list[str]:
    if not os.path.isdir(path):  # "" is none, unlike Path("")
        for ending in (".bin", ".idx"):
            if path.endswith(ending) and Path(path).is_file():
                return [path.removesuffix(ending)]
        return [path]
    files = {str(file) for file in Path(path).iterdir() if file.suffix in (".bin", ".idx")}
    found = sorted({file[: -len(".bin")] for file in files})
    if not found:
        raise DataError(f"there is no dataset in the folder {path}")
    for prefix in found:
        for file in (str(bin_path(prefix)), str(idx_path(prefix))):
            if file not in files:
                raise DataError(f"{file} is missing: the dataset {prefix} is not whole")
    return found


def _label_names(prefix: str) -> list[str]:
    """Where the preprocessing puts the labels of a dataset: beside KEY, or in its place."""
    if not prefix.endswith(_DOCUMENT):
        return [f"{prefix}_label"]
    stem = prefix.removesuffix(_DOCUMENT)
    by_key = [f"{stem}_label{_DOCUMENT}"]
    if stem.endswith("_text"):
        by_key.append(f"{stem.removesuffix('_text')}_label{_DOCUMENT}")
    return by_key


def _labels_of(prefix: str) -> str | None:
    return next((name for name in _label_names(prefix) if idx_path(name).is_file()), None)


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _common_dtype(datasets: Sequence[IndexedDataset]) -> np.dtype:
    first = datasets[0]
    for dataset in datasets[1:]:
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{first.path_prefix} holds {first.dtype} ids, {dataset.path_prefix} "
                f"{dataset.dtype}: they were made with different tokenizers; blend them with "
                "train_data_paths if that is what you want, or tokenize one of them again"
            )
    return first.dtype


def _copy(datasets: Sequence[IndexedDataset], writer: IndexedWriter, bar: Any) -> None:
    for dataset in datasets:
        lengths = dataset.sequence_lengths
        ends = dataset.sequence_offsets // dataset.dtype.itemsize + lengths
        if ends[0] != lengths[0] or (np.diff(ends) != lengths[1:]).any():
            raise DataError(f"{dataset.path_prefix}: its documents do not lie end to end")
        for start in range(0, dataset.tokens, _CHUNK):
            ids = dataset.span(start, min(start + _CHUNK, dataset.tokens))
            writer.add_ids(ids)
            bar.update(ids.nbytes)
        writer.add_lengths(lengths)
