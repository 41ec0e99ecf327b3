"""LAMBADA and PIQA from the files their authors published, below one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from neox.errors import DataError

Document = dict[str, Any]


class LocalData(NamedTuple):
    path: Path  # the file of the documents that are scored
    splits: dict[str, list[Document]]  # under lm-eval's names of the splits


def read_lambada(folder: Path) -> LocalData | None:
    """The test set in OpenAI's version, or None if its file is not there. DataError for damage."""
    path = _find(
        folder, ("lambada", "lambada_openai", "."), ("lambada_test.jsonl", "lambada_test_en.jsonl")
    )
    if path is None:
        return None
    return LocalData(path, {"test": read_documents(path, ("text",))})


def read_piqa(folder: Path) -> LocalData | None:
    """The validation set, and the training set (for few-shot examples) if it is there too.

    None when there is no validation file; DataError for damage or missing labels.
    """
    path = _find(folder, ("piqa", "physicaliqa-train-dev", "."), ("valid.jsonl", "dev.jsonl"))
    if path is None:
        return None
    splits = {"validation": _read_piqa_split(path)}
    training = path.with_name("train.jsonl")
    if training.exists():
        splits["train"] = _read_piqa_split(training)
    return LocalData(path, splits)


# lm-eval's name of a task -> its reader, and what to put into the folder for it.
READERS: dict[str, Callable[[Path], LocalData | None]] = {
    "lambada_openai": read_lambada,
    "piqa": read_piqa,
}
FILES = {
    "lambada_openai": "lambada/lambada_test.jsonl (OpenAI's version of LAMBADA's test set)",
    "piqa": "piqa/valid.jsonl and piqa/valid-labels.lst (PIQA's validation set)",
}


def read_documents(path: Path, fields: Iterable[str]) -> list[Document]:
    """One document a line, each a JSON object with text in all `fields`; the rest is left out.

    DataError, with the line, for anything else.
    """
    documents = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            document = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(document, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        for field in fields:
            if not isinstance(document.get(field), str) or not document[field]:
                found = json.dumps(document[field]) if field in document else "missing"
                raise DataError(f'{path}, line {number}: "{field}" has to be text, it is {found}')
        documents.append({field: document[field] for field in fields})
    return documents


def _read_piqa_split(path: Path) -> list[Document]:
    documents = read_documents(path, ("goal", "sol1", "sol2"))
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.exists():
        raise DataError(f"{labels_path} is missing: it holds the answers to {path.name}")
    labels = _lines(labels_path)
    for number, label in enumerate(labels, start=1):
        if label.strip() not in ("0", "1"):
            raise DataError(f"{labels_path}, line {number}: a label is 0 or 1, this is {label!r}")
    if len(labels) != len(documents):
        raise DataError(
            f"{labels_path} has {len(labels)} labels for the {len(documents)} questions in "
            f"{path}: one of the two files is incomplete"
        )
    return [
        {**document, "label": int(label)} for document, label in zip(documents, labels, strict=True)
    ]


def _find(folder: Path, below: Iterable[str], names: Iterable[str]) -> Path | None:
    candidates = [folder / place / name for place in below for name in names]
    return next((path for path in candidates if path.exists()), None)


def _lines(path: Path) -> list[str]:
    """The file's lines, without empty ones at its end; a JSON text may hold other line breaks."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    lines = []
    for number, line in enumerate(data.rstrip().split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number}: not text in UTF-8") from None
    if lines == [""]:
        raise DataError(f"{path} is empty")
    return lines
