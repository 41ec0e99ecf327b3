"""Local files of LAMBADA and PIQA: where they are found, and what is said of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neox.errors import DataError
from neox.evaluation.local import read_lambada, read_piqa

PASSAGES = [{"text": "one two\u2028three"}, {"text": "four five six"}]
QUESTIONS = [{"goal": f"goal {i}", "sol1": f"a {i}", "sol2": f"b {i}", "id": i} for i in range(3)]


def lines(*objects: object) -> str:
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "place",
    ["lambada/lambada_test.jsonl", "lambada_test.jsonl", "lambada_openai/lambada_test_en.jsonl"],
)
def test_lambada_is_found(tmp_path, place):
    path = write(tmp_path / place, lines(*PASSAGES) + "\n\n")
    data = read_lambada(tmp_path)
    assert data is not None
    assert data.path == path
    assert data.splits == {"test": PASSAGES}


@pytest.mark.parametrize(
    "place", ["piqa/valid.jsonl", "valid.jsonl", "physicaliqa-train-dev/dev.jsonl"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_piqa_is_found_and_labelled(tmp_path, place, newline):
    path = write(tmp_path / place, lines(*QUESTIONS).replace("\n", newline))
    write(path.with_name(f"{path.stem}-labels.lst"), newline.join("011"))
    data = read_piqa(tmp_path)
    assert data is not None
    assert data.path == path
    documents = data.splits.pop("validation")
    assert not data.splits
    assert [document["label"] for document in documents] == [0, 1, 1]
    assert documents[1] == {"goal": "goal 1", "sol1": "a 1", "sol2": "b 1", "label": 1}


def test_piqa_s_training_set_is_taken_along(tmp_path):
    for stem, labels in [("valid", "0\n1\n1\n"), ("train", "1\n0\n0\n")]:
        write(tmp_path / f"{stem}.jsonl", lines(*QUESTIONS))
        write(tmp_path / f"{stem}-labels.lst", labels)
    data = read_piqa(tmp_path)
    assert data is not None
    assert [document["label"] for document in data.splits["train"]] == [1, 0, 0]


@pytest.mark.parametrize("read", [read_lambada, read_piqa])
def test_nothing_there_is_none(tmp_path, read):
    write(tmp_path / "other.jsonl", lines(*PASSAGES))
    assert read(tmp_path) is None


DAMAGED_LAMBADA: list[tuple[str | bytes, str]] = [
    (lines(*PASSAGES)[:-8], r", line 2: not JSON \(Unterminated string"),
    (lines(PASSAGES[0]) + "\n" + lines(PASSAGES[1]), ", line 2: not JSON"),
    (lines(PASSAGES[0], ["text"]), ", line 2: not a JSON object"),
    (lines({"Text": "one"}), ', line 1: "text" has to be text, it is missing'),
    (lines(PASSAGES[0], {"text": 3}), ', line 2: "text" has to be text, it is 3'),
    (lines({"text": ""}), ', line 1: "text" has to be text, it is ""'),
    (lines(PASSAGES[0]).encode() + b"\x1f\x8b\xff\xfe\n", ", line 2: not text in UTF-8"),
    ("", " is empty"),
    ("\n\n", " is empty"),
]


@pytest.mark.parametrize("content, message", DAMAGED_LAMBADA)
def test_damaged_lambada(tmp_path, content, message):
    path = write(tmp_path / "lambada_test.jsonl", content)
    with pytest.raises(DataError, match=f"^{path}{message}"):
        read_lambada(tmp_path)


def without_labels(folder: Path) -> None:
    (folder / "valid-labels.lst").unlink()


def with_labels(text: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "valid-labels.lst", text)


def cut_questions(folder: Path) -> None:
    write(folder / "valid.jsonl", lines(*QUESTIONS[:2]))


def no_second_answer(folder: Path) -> None:
    write(folder / "valid.jsonl", lines(QUESTIONS[0], {"goal": "g", "sol1": "a"}, QUESTIONS[2]))


def labels_are_a_folder(folder: Path) -> None:
    (folder / "valid-labels.lst").unlink()
    (folder / "valid-labels.lst").mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_labels, "valid-labels.lst is missing: it holds the answers to valid.jsonl"),
        (with_labels("0\n1\n"), "valid-labels.lst has 2 labels for the 3 questions in .*valid"),
        (with_labels("0\n1\n1\n0\n"), "valid-labels.lst has 4 labels for the 3 questions"),
        (with_labels("0\n2\n1\n"), "valid-labels.lst, line 2: a label is 0 or 1, this is '2'"),
        (with_labels("0\n\n1\n"), "valid-labels.lst, line 2: a label is 0 or 1, this is ''"),
        (with_labels(""), "valid-labels.lst is empty"),
        (cut_questions, "has 3 labels for the 2 questions .* one of the two files is incomplete"),
        (no_second_answer, 'valid.jsonl, line 2: "sol2" has to be text, it is missing'),
        (labels_are_a_folder, "valid-labels.lst cannot be read: Is a directory"),
    ],
)
def test_damaged_piqa(tmp_path, damage, message):
    write(tmp_path / "valid.jsonl", lines(*QUESTIONS))
    write(tmp_path / "valid-labels.lst", "0\n1\n1\n")
    assert read_piqa(tmp_path) is not None
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_piqa(tmp_path)
