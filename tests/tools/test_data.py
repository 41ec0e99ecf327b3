"""tools/data.py as a user runs it."""

from __future__ import annotations

import importlib.util
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from neox.data.indexed import IndexedWriter, bin_path, idx_path, open_indexed
from tests import small_tokenizer
from tests.data.datasets import write_dataset, write_labels

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_tool", REPOSITORY / "tools/data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path, monkeypatch, capsys) -> Run:
    """Runs a command line in `tmp_path`: status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool.signal, "signal", lambda *about: None)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = tool.main(words)
        return (status, *capsys.readouterr())

    return call


def write_texts(prefix: Path, texts: list[str], *, dtype: type = np.uint16) -> list[list[int]]:
    """Documents of a small tokenizer's ids, each with its end."""
    tokenizer = small_tokenizer.train()
    documents = [[*tokenizer.encode(text).ids, 0] for text in texts]
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for ids in documents:
            writer.add(np.array(ids, dtype=dtype), np.array([len(ids)]))
    return documents


def write_config(folder: Path, **values: Any) -> None:
    small_tokenizer.write(folder)
    given = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "data_path": "data",
        "split": "1",
        "eval_iters": 0,
        "train_iters": 5,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "num_gpus": 1,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": "tokenizer.json",
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    }
    merged = {key: value for key, value in (given | values).items() if value is not None}
    (folder / "a.yml").write_text(yaml.safe_dump(merged))


TEXTS = ["It was the best of times", "it was the worst of times", "the age of wisdom, of foolish"]


def test_show_prints_what_training_reads(run: Run, tmp_path: Path) -> None:
    documents = write_texts(tmp_path / "data", TEXTS)
    write_config(tmp_path, pack_impl="unpacked", seq_length=24, max_position_embeddings=24)
    status, out, err = run("show", "a.yml", "--step", "2", "-n", "4")
    assert (status, err) == (0, "")
    assert "step 2 of 5: 4 samples = 2 in a micro-batch x 2 accumulated x 1 replica" in out
    for place in ("micro-batch 0, replica 0, row 0", "micro-batch 1, replica 0, row 1"):
        assert place in out
    rows = out.split("\nmicro-batch ")[1:]
    assert len(rows) == 4
    for row in rows:
        n = int(row.split("document ")[1].split(",")[0])
        ids = documents[n]
        assert f"data, document {n}, tokens 0 to {len(ids)}" in row
        assert f"masked 1\n    ids   {ids[0]}\n" in row
        assert f"learnt {len(ids) - 1}\n" in row
        shown = " ".join(row.split("learnt")[1].split("ids   ")[1].split("text")[0].split())
        assert shown == " ".join(map(str, ids[1:]))
        assert f'{TEXTS[n][-5:]}<end of document>"' in " ".join(row.split())
        assert f"padding {25 - len(ids)}" in row


def test_show_marks_masked_labels(run: Run, tmp_path: Path) -> None:
    documents = write_texts(tmp_path / "text", TEXTS[:1])
    (ids,) = documents
    flags = [n >= 4 for n in range(len(ids))]
    write_labels(tmp_path / "labels", [np.array(ids, dtype=np.uint16)], [flags])
    splits = ("train", "valid", "test")
    write_config(
        tmp_path,
        data_path=None,
        split=None,
        pack_impl="unpacked",
        seq_length=len(ids) - 1,
        max_position_embeddings=64,
        train_label_data_paths=["labels"],
        **{f"{split}_data_paths": ["text"] for split in splits},
    )
    status, out, _ = run("show", "a.yml", "--step", "1", "-n", "1")
    assert status == 0
    assert f"masked 4\n    ids   {' '.join(map(str, ids[:4]))}\n" in out
    assert f"learnt {len(ids) - 4}\n" in out
    assert "padding" not in out
    assert "labels that are not the text's" not in out
    assert out.endswith("\n3 more: -n 4\n")

    other = [(token + 1) % 200 for token in ids]
    with IndexedWriter(tmp_path / "labels", dtype=np.dtype(np.int32)) as writer:
        writer.add(np.array(other, dtype=np.int32), np.array([len(other)]))
    _, out, _ = run("show", "a.yml", "--step", "1", "-n", "1")
    assert f"labels that are not the text's tokens: {other[1]} for {ids[1]}" in out


def test_show_of_one_rank_and_micro_batch(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [500], modulo=250)
    write_config(tmp_path, num_gpus=4, model_parallel_size=2, hidden_size=16, num_attention_heads=2)
    _, whole, _ = run("show", "a.yml", "--step", "3", "-n", "8")
    assert "8 samples = 2 in a micro-batch x 2 accumulated x 2 replicas" in whole
    rows = {row.split("\n")[0]: row for row in whole.split("\nmicro-batch ")[1:]}
    assert len(rows) == 8
    assert len({row.split("\n")[1] for row in rows.values()}) == 8
    for rank, replica in enumerate((0, 0, 1, 1)):
        words = ("--rank", str(rank), "--micro-batch", "1", "-n", "8")
        _, out, _ = run("show", "a.yml", "--step", "3", *words)
        shown = {row.split("\n")[0]: row for row in out.split("\nmicro-batch ")[1:]}
        assert list(shown) == [f"1, replica {replica}, row {row}" for row in (0, 1)]
        assert all(row.rstrip() == rows[title].rstrip() for title, row in shown.items())


def test_show_follows_epochs(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [129], modulo=250)  # 8 samples
    write_config(tmp_path, train_iters=None, train_epochs=3)
    _, first, _ = run("show", "a.yml", "--step", "1", "-n", "4")
    status, third, _ = run("show", "a.yml", "--step", "5", "-n", "4")
    assert status == 0
    assert "step 5 of 6" in third
    assert first.split("\n\n", 1)[1] == third.split("\n\n", 1)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--step", "0"), "--step 0: choose one from 1 to 5"),
        (("--step", "6"), "--step 6: choose one from 1 to 5"),
        (("--step", "1", "--rank", "1"), "--rank 1: choose one from 0 to 0"),
        (("--step", "1", "--micro-batch", "2"), "--micro-batch 2: choose one from 0 to 1"),
        (("--step", "1", "--set", "vocab_file=none"), "vocab_file is"),
        (("--step", "1", "--set", "data_path=none"), "none.bin and none.idx do not exist"),
    ],
)
def test_show_of_what_there_is_not(run: Run, tmp_path: Path, words, message: str) -> None:
    write_dataset(tmp_path / "data", [500], modulo=250)
    write_config(tmp_path)
    status, _, err = run("show", "a.yml", *words)
    assert status == 2
    assert message in err


def test_show_of_another_tokenizers_data(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [500])
    write_config(tmp_path)
    status, _, err = run("show", "a.yml", "--step", "2")
    assert status == 2
    assert "made with another tokenizer" in err


def test_count(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [*range(101), 5000])
    texts = write_dataset(tmp_path / "b", [4, 4])
    write_labels(tmp_path / "labels", texts, [[0, 0, 1, 1], [0, 1, 1, 1]])
    status, out, _ = run("count", "a", "b", "labels")
    assert status == 0
    a, b, labels = out.split("\nb\n")[0], *out.split("\nb\n")[1].split("\nlabels\n")
    assert "documents    102, 1 empty" in a
    assert "tokens       10,050, stored as uint16" in a
    assert "largest id   10,049" in a
    assert "lengths      0 to 5,000, mean 98.5" in a
    # Nearest rank: the smallest length with at least p % of 102 documents up to it.
    assert "1 %: 1, 5 %: 5, 25 %: 25, 50 %: 50, 75 %: 76, 95 %: 96, 99 %: 100" in a
    assert "tokens       8, stored as uint16" in b
    assert "masked" not in b
    assert "masked       3 (37.5%)" in labels
    assert "together 106 documents, 10,066 tokens" in labels
    status, _, err = run("count", "absent")
    assert status == 2 and "there is no dataset absent" in err


def texts_of(prefix: Path) -> list[list[int]]:
    indexed = open_indexed(str(prefix))
    return [indexed.get(n).tolist() for n in range(len(indexed))]


def test_merge_keeps_every_document_in_order(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("neox.data.merge._CHUNK", 7)
    lengths = {"a": [3, 0, 40], "b": [5], "c": [0, 0, 2, 9]}
    expected = []
    for n, (name, sizes) in enumerate(lengths.items()):
        texts = write_dataset(tmp_path / name, sizes, first=1000 * n)
        expected += [text.tolist() for text in texts]
    status, out, _ = run("merge", "--input", "a", "b.bin", "c", "--output-prefix", "new/all")
    assert status == 0
    assert "8 documents, 59 tokens\nwrote new/all.bin and .idx\n" in out
    assert texts_of(tmp_path / "new/all") == expected
    # The same bytes as if they had been written at once.
    with IndexedWriter(tmp_path / "once", dtype=np.dtype(np.uint16)) as writer:
        for text in expected:
            writer.add(np.array(text, dtype=np.uint16), np.array([len(text)]))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "once").read_bytes() == path(tmp_path / "new/all").read_bytes()


@pytest.mark.parametrize(
    ("names", "labels", "output", "output_labels"),
    [
        ("{}_text_document", "{}_label_document", "all_text_document", "all_label_document"),
        ("{}_chat_document", "{}_chat_label_document", "x_chat_document", "x_chat_label_document"),
        ("{}_text_document", "{}_text_label_document", "all", "all_label"),
    ],
)
def test_merge_of_a_folder_takes_labels_along(
    run: Run, tmp_path: Path, names: str, labels: str, output: str, output_labels: str
) -> None:
    (tmp_path / "parts").mkdir()
    expected, expected_labels = [], []
    for n, name in enumerate("ab"):
        texts = write_dataset(tmp_path / "parts" / names.format(name), [4, 6], first=100 * n)
        flags = [np.arange(len(text)) > 2 for text in texts]
        write_labels(tmp_path / "parts" / labels.format(name), texts, flags)
        expected += [text.tolist() for text in texts]
        expected_labels += [[-100] * 3 + text.tolist()[3:] for text in texts]
    status, out, err = run("merge", "--input", "parts", "--output-prefix", output)
    assert (status, err) == (0, "")
    assert f"wrote {output_labels}.bin and .idx (labels)" in out
    assert texts_of(tmp_path / output) == expected
    assert texts_of(tmp_path / output_labels) == expected_labels
    assert open_indexed(tmp_path / output_labels).dtype == np.int32


def test_what_cannot_be_merged(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [3, 4])
    write_dataset(tmp_path / "b", [3, 4])
    write_texts(tmp_path / "wide", ["It was"], dtype=np.int32)
    labelled = write_dataset(tmp_path / "c", [3, 4])
    write_labels(tmp_path / "c_label", labelled, [[1] * 3, [1] * 4])
    write_dataset(tmp_path / "d", [3, 4])
    write_dataset(tmp_path / "d_label", [3, 5])
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "e.bin").write_bytes(b"12")
    before = sorted(file.name for file in tmp_path.iterdir())
    cases = {
        ("a", "wide"): "a holds uint16 ids, wide int32: they were made with different tokenizers",
        ("a", "c"): "a has no labels beside it (such as a_label), but c_label is there",
        ("d",): "document 1 has 5 labels in d_label, but 4 tokens in d",
        ("a", "absent"): "there is no dataset absent: absent.idx is missing",
        ("",): "there is no dataset",
        ("empty",): "there is no dataset in the folder empty",
        ("half",): "half/e.idx is missing: the dataset half/e is not whole",
    }
    for inputs, message in cases.items():
        status, _, err = run("merge", "--input", *inputs, "--output-prefix", "out")
        assert status == 2, inputs
        assert message in err
    status, _, err = run("merge", "--input", "a", "b", "--output-prefix", "./b")
    assert status == 2
    assert "b is one of the datasets to merge" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_merge_into_a_folder_that_cannot_be(run: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [3, 4])
    (tmp_path / "file").touch()
    status, _, err = run("merge", "--input", "a", "--output-prefix", "file/out")
    assert status == 2
    assert "cannot write file/out: " in err


def test_merge_of_more_datasets_than_are_open_at_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(40):
        write_dataset(tmp_path / "in" / f"{n:02}", [n + 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        status, out, _ = run("merge", "--input", "in", "--output-prefix", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert status == 0
    assert "40 documents, 820 tokens" in out


def test_a_merge_that_fails_leaves_the_old_files(run: Run, tmp_path: Path, monkeypatch) -> None:
    write_dataset(tmp_path / "a", [3, 4])
    write_dataset(tmp_path / "out", [9])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(writer: IndexedWriter, ids: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add_ids", full)
    status, _, err = run("merge", "--input", "a", "--output-prefix", "out")
    assert status == 2
    assert "cannot write out: No space left on device" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
