"""LAMBADA and PIQA from the files their authors published, below one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from neox.errors import DataError

Document = dict[str, Any]


class PublishedFile(NamedTuple):
    documents: int
    size: int  # bytes
    sha256: str


PUBLISHED = {
    "lambada_test.jsonl": PublishedFile(
        5153, 1_819_752, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
    ),
    "valid.jsonl": PublishedFile(
        1838, 495_929, "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d"
    ),
    "valid-labels.lst": PublishedFile(
        1838, 3_676, "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb"
    ),
    # Of PIQA's train.jsonl and train-labels.lst no checksum is known. They are not scored, they
    # only serve as few-shot examples.
}
# AI2's archive calls PIQA's validation set dev and gives each question an id, which is left out.
# Of these files no checksum is known: their documents are compared as the others would hold them.
REWRITTEN = {"dev.jsonl": "valid.jsonl", "dev-labels.lst": "valid-labels.lst"}
# The hub's name of the same file.
RENAMED = {"lambada_test_en.jsonl": "lambada_test.jsonl"}


class LocalData(NamedTuple):
    path: Path  # the file of the documents that are scored
    splits: dict[str, list[Document]]  # under lm-eval's names of the splits
    published: bool  # what is scored are the published documents
    sha256: dict[str, str]  # of every file that was read, by its name

    def facts(self) -> dict[str, Any]:
        """What a score of these documents depends on, for a file of results."""
        return {"file": str(self.path), "published": self.published, "sha256": self.sha256}


def read_lambada(folder: Path, own_documents: bool = False) -> LocalData | None:
    """The test set in OpenAI's version, or None if its file is not there.

    DataError for damage, and for another file than the published one unless `own_documents`.
    """
    path = _find(
        folder, ("lambada", "lambada_openai", "."), ("lambada_test.jsonl", "lambada_test_en.jsonl")
    )
    if path is None:
        return None
    documents = read_documents(path, ("text",))
    published = _is_published(path, map(json.dumps, documents), own_documents)
    return LocalData(path, {"test": documents}, published, {path.name: _sha256(path.read_bytes())})


def read_piqa(folder: Path, own_documents: bool = False) -> LocalData | None:
    """The validation set, and the training set (for few-shot examples) if it is there too.

    None when there is no validation file; DataError for damage, for missing labels, and for other
    validation files than the published ones unless `own_documents`.
    """
    path = _find(folder, ("piqa", "physicaliqa-train-dev", "."), ("valid.jsonl", "dev.jsonl"))
    if path is None:
        return None
    questions, labels = _read_piqa_split(path)
    published = _is_published(path, map(json.dumps, questions), own_documents)
    published &= _is_published(_labels_of(path), labels, own_documents)
    splits = {"validation": _labelled(questions, labels)}
    files = [path, _labels_of(path)]
    training = path.with_name("train.jsonl")
    if training.exists():
        splits["train"] = _labelled(*_read_piqa_split(training))
        files += [training, _labels_of(training)]
    sums = {file.name: _sha256(file.read_bytes()) for file in files}
    return LocalData(path, splits, published, sums)


# lm-eval's name of a task -> its reader, and what to put into the folder for it.
READERS: dict[str, Callable[[Path, bool], LocalData | None]] = {
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


def _read_piqa_split(path: Path) -> tuple[list[Document], list[str]]:
    """Questions, and for each the label, "0" or "1"."""
    questions = read_documents(path, ("goal", "sol1", "sol2"))
    labels_path = _labels_of(path)
    if not labels_path.exists():
        raise DataError(f"{labels_path} is missing: it holds the answers to {path.name}")
    labels = [label.strip() for label in _lines(labels_path)]
    for number, label in enumerate(labels, start=1):
        if label not in ("0", "1"):
            raise DataError(f"{labels_path}, line {number}: a label is 0 or 1, this is {label!r}")
    if len(labels) != len(questions):
        raise DataError(
            f"{labels_path} has {len(labels)} labels for the {len(questions)} questions in "
            f"{path}: one of the two files is incomplete"
        )
    return questions, labels


def _labels_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}-labels.lst")


def _labelled(questions: list[Document], labels: list[str]) -> list[Document]:
    return [
        {**question, "label": int(label)} for question, label in zip(questions, labels, strict=True)
    ]


def _is_published(path: Path, lines: Iterable[str], own_documents: bool) -> bool:
    """Whether a file is the published one; `lines` are its documents as that one would hold them.

    DataError, with what differs, if it is not and is not said to be one's own either.
    """
    content = path.read_bytes()
    name = RENAMED.get(path.name, path.name)
    lines = list(lines)
    if name in REWRITTEN:
        name = REWRITTEN[name]
        content = "".join(f"{line}\n" for line in lines).encode()
    expected = PUBLISHED[name]
    found = PublishedFile(len(lines), len(content), _sha256(content))
    if found == expected:
        return True
    if own_documents:
        return False
    if found.documents == expected.documents:
        state = "changed"
    else:
        state = "incomplete" if found.documents < expected.documents else "longer than published"
    unit = "labels" if path.suffix == ".lst" else "documents"
    raise DataError(
        f"{path} is {state}: it has {found.documents:,} {unit} in {found.size:,} bytes (SHA-256 "
        f"{found.sha256}), the published {name} has {expected.documents:,} in {expected.size:,} "
        f"({expected.sha256}). Put the published file there; or, if these {unit} are your own, set "
        "eval_own_documents: true"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
