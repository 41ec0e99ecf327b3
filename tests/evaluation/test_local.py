"""Local files of LAMBADA and PIQA: where they are found, and what is said of damaged ones.

The tests' own documents are small: where they are to pass for the published ones, `PUBLISHED` is
made to say so (tests/conformance reads those that were published).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neox.errors import DataError
from neox.evaluation import local
from neox.evaluation.local import PublishedFile, read_lambada, read_piqa

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
    data = read_lambada(tmp_path, own_documents=True)
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
    data = read_piqa(tmp_path, own_documents=True)
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
    data = read_piqa(tmp_path, own_documents=True)
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
        read_lambada(tmp_path, own_documents=True)


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
    assert read_piqa(tmp_path, own_documents=True) is not None
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_piqa(tmp_path, own_documents=True)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


PUBLISHED = {
    "lambada_test.jsonl": "".join(json.dumps(o) + "\n" for o in PASSAGES),
    "valid.jsonl": "".join(
        json.dumps({key: q[key] for key in ("goal", "sol1", "sol2")}) + "\n" for q in QUESTIONS
    ),
    "valid-labels.lst": "0\n1\n1\n",
}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PUBLISHED.items():
        write(tmp_path / name, text)
        known = PublishedFile(text.count("\n"), len(text), sha256(text))
        monkeypatch.setitem(local.PUBLISHED, name, known)
    return tmp_path


@pytest.mark.parametrize("own_documents", [False, True])
def test_published_documents_are_known_as_such(published, own_documents):
    for read, names in [
        (read_lambada, ["lambada_test.jsonl"]),
        (read_piqa, ["valid.jsonl", "valid-labels.lst"]),
    ]:
        data = read(published, own_documents)
        assert data is not None
        assert data.published
        assert data.facts() == {
            "file": str(published / names[0]),
            "published": True,
            "sha256": {name: sha256(PUBLISHED[name]) for name in names},
        }


def test_their_other_names(published):
    """AI2's archive has an id in each of PIQA's questions, and line ends as they may be."""
    (published / "lambada_test.jsonl").rename(published / "lambada_test_en.jsonl")
    for name in ("valid.jsonl", "valid-labels.lst"):
        (published / name).unlink()
    questions = [{"id": "x", **question} for question in QUESTIONS]
    write(published / "dev.jsonl", lines(*questions).replace("\n", "\r\n"))
    write(published / "dev-labels.lst", "0\n1\n1")
    lambada, piqa = read_lambada(published), read_piqa(published)
    assert lambada is not None and lambada.published
    assert piqa is not None and piqa.published
    assert set(piqa.sha256) == {"dev.jsonl", "dev-labels.lst"}
    write(published / "dev-labels.lst", "0\n1\n0\n")
    with pytest.raises(DataError, match=r"dev-labels.lst is changed: .* published valid-labels"):
        read_piqa(published)


L = PUBLISHED["lambada_test.jsonl"]
V = PUBLISHED["valid.jsonl"]
DIFFERENT = [
    ({"lambada_test.jsonl": L.splitlines(True)[0]}, "incomplete", "1 documents"),
    ({"lambada_test.jsonl": L * 2}, "longer than published", "4 documents"),
    ({"lambada_test.jsonl": L.replace("five", "six")}, "changed", "2 documents"),
    ({"lambada_test.jsonl": L.replace("\n", "\r\n")}, "changed", "2 documents"),
    ({"lambada_test.jsonl": L.rstrip()}, "changed", "2 documents"),
    ({"valid.jsonl": V.replace("a 1", "a one")}, "changed", "3 documents"),
    ({"valid-labels.lst": "0\n1\n0\n"}, "changed", "3 labels"),
    (
        {"valid.jsonl": "".join(V.splitlines(True)[:2]), "valid-labels.lst": "0\n1\n"},
        "incomplete",
        "2 documents",
    ),
]


@pytest.mark.parametrize("files, state, count", DIFFERENT)
def test_other_documents_than_the_published_ones(published, files, state, count):
    for name, text in files.items():
        write(published / name, text)
    name, text = next(iter(files.items()))
    read = read_lambada if name.startswith("lambada") else read_piqa
    known = local.PUBLISHED[name]
    with pytest.raises(DataError) as caught:
        read(published)
    unit = count.split()[1]
    assert str(caught.value) == (
        f"{published / name} is {state}: it has {count} in {len(text)} bytes (SHA-256 "
        f"{sha256(text)}), the published {name} has {known.documents} in {known.size} "
        f"({known.sha256}). Put the published file there; or, if these {unit} are your own, set "
        "eval_own_documents: true"
    )
    data = read(published, own_documents=True)
    assert data is not None
    assert not data.published
    assert data.sha256[name] == sha256(text)


def test_plain_damage_is_told_first(published):
    write(published / "lambada_test.jsonl", L[:-8])
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_lambada(published)
    write(published / "valid-labels.lst", "0\n1\n")
    with pytest.raises(DataError, match="has 2 labels for the 3 questions"):
        read_piqa(published)


def test_examples_need_not_be_the_published_ones(published):
    """No checksum of them is known; what they were is told."""
    write(published / "train.jsonl", lines(QUESTIONS[0]))
    write(published / "train-labels.lst", "1\n")
    data = read_piqa(published)
    assert data is not None
    assert data.published
    assert data.sha256["train-labels.lst"] == sha256("1\n")
