from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neox.data import corpus
from neox.data.indexed import open_indexed
from neox.data.preprocess import Summary, preprocess
from neox.data.recipes import TextRecipe
from neox.errors import DataError
from neox.tokenizer import load_tokenizer
from tests import small_tokenizer
from tests.small_disk import small_disk, small_files
from tools import preprocess_data

TEXTS = ["It was the best of times,", "naïve 東京 🙂", "  \n", "a\u2028b\x85c", "worst " * 400, "x"]
ROOT = Path(__file__).parents[2]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    lines = [json.dumps({"text": text, "meta": {"n": n}}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(inputs: list[Path], folder: Path, *, workers: int = 1, **options) -> Summary:
    """With the character tokenizer: the ids are the bytes of the text."""
    recipe = TextRecipe(load_tokenizer("CharLevelTokenizer"), **options)
    return preprocess(inputs, folder / "out", recipe, workers=workers)


def texts_of(folder: Path, key: str = "text") -> list[str]:
    indexed = open_indexed(str(folder / f"out_{key}_document"))
    return [bytes(indexed.get(n).astype(np.uint8)).decode() for n in range(len(indexed))]


def test_documents_come_back(tmp_path: Path) -> None:
    done = run([write_jsonl(tmp_path / "in.jsonl")], tmp_path)
    assert texts_of(tmp_path) == TEXTS
    assert (done.documents, done.tokens) == (6, sum(len(text.encode()) for text in TEXTS))


def test_each_kind_of_file(tmp_path: Path) -> None:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = write_jsonl(folder / "a.jsonl", ["plain"]).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace(b"plain", b"gzip")))
    # Zstandard files may be several frames, one after the other.
    frames = [lines.replace(b"plain", b"zst1"), lines.replace(b"plain", b"zst2")]
    (folder / "c.jsonl.zst").write_bytes(b"".join(zstd.compress(frame) for frame in frames))
    (folder / "d.txt").write_text("one\n\nwhole text\n")
    (folder / "e.json.gz").write_bytes(gzip.compress(lines.replace(b"plain", b"C4")))
    (folder / "README.md").write_text("not a corpus")
    run([folder, folder / "a.jsonl"], tmp_path)
    expected = ["plain", "gzip", "zst1", "zst2", "one\n\nwhole text\n", "C4", "plain"]
    assert texts_of(tmp_path) == expected


def test_empty_texts_and_blank_lines_make_no_document(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": ""}\n\n   \n{"text": "a"}\r\n{"text": []}\n{"text": "b"}')
    run([path], tmp_path, append_eod=True)
    assert texts_of(tmp_path) == ["a\0", "b\0"]


def test_paragraphs_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": ["one", "two"]}\n')
    run([path], tmp_path)
    assert texts_of(tmp_path) == ["one\n\ntwo"]


def test_keys_stay_aligned(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    records = [{"q": "a", "a": "b"}, {"q": "", "a": "c"}, {"q": "", "a": ""}, {"q": "d", "a": "e"}]
    path.write_text("\n".join(map(json.dumps, records)))
    run([path], tmp_path, keys=("q", "a"), append_eod=True)
    assert texts_of(tmp_path, "q") == ["a\0", "\0", "d\0"]
    assert texts_of(tmp_path, "a") == ["b\0", "c\0", "e\0"]


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.data.corpus._CHUNK_BYTES", 2000)  # many pieces of a small file
    path = write_jsonl(tmp_path / "in.jsonl", [f"{n} {text}" for n in range(50) for text in TEXTS])
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    written = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        recipe = TextRecipe(tokenizer, append_eod=True)
        preprocess([path], folder / "out", recipe, workers=workers)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"out_text_document.bin", "out_text_document.idx"}


def test_ftfy(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "schÃ¶n"}\n{"text": "half \\ud83d a pair"}\n')
    run([path], tmp_path, fix_text=True)
    assert texts_of(tmp_path) == ["schön", "half \ufffd a pair"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b'{"text": "a"}\n\n{"text": \n', "in.jsonl:3, column 9: not JSON"),
        (
            "in.jsonl",
            b'{"text": "a"}\n{"txt": "b", "id": 1}',
            'in.jsonl:2: no key "text"; this line has: txt, id',
        ),
        ("in.jsonl", b'{"text": 5}', 'in.jsonl:1: "text" is a int'),
        ("in.jsonl", b"[1]", "in.jsonl:1: a JSON object is needed"),
        ("in.jsonl", b'{"text": "\\ud800"}', "in.jsonl:1: half a surrogate pair"),
        ("in.jsonl", b'{"text": "\xff"}', "in.jsonl:1: not UTF-8"),
        ("in.txt", b"\xff", "in.txt is not UTF-8"),
        ("in.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "damaged or cut off"),
        ("in.jsonl.gz", b"garbage", "damaged or cut off"),
        ("in.jsonl.zst", b"garbage", "damaged or cut off"),
        ("in.csv", b"a,b", "the name must end in .jsonl"),
    ],
)
def test_bad_input_names_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str, workers: int
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        run([tmp_path / name], tmp_path, workers=workers)
    assert message in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]  # nothing half-written


def test_line_numbers_go_on_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.data.corpus._CHUNK_BYTES", 50)
    path = write_jsonl(tmp_path / "in.jsonl", ["a"] * 20)
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(DataError, match=r"in\.jsonl:21, column 1: not JSON"):
        run([path], tmp_path)


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        run([tmp_path / "absent"], tmp_path)
    with pytest.raises(DataError, match="no file in"):
        run([tmp_path], tmp_path)


def test_two_keys_cannot_come_from_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(DataError, match="cannot fill 2"):
        run([tmp_path / "in.txt"], tmp_path, keys=("a", "b"))


class DyingTokenizer:
    vocab_size, eod = 512, 0

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        os._exit(9)


def test_a_worker_that_dies(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match="process died"):
        preprocess([path], tmp_path / "out", TextRecipe(DyingTokenizer()), workers=2)


class WaitingTokenizer:
    """Says that it is at work, and waits to be killed."""

    vocab_size, eod = 512, 0

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        if texts[0] == "second":
            print("ready", flush=True)
            signal.pause()
        return [[1]] * len(texts)


def preprocess_until_killed(folder: Path) -> None:
    corpus._CHUNK_BYTES = 1
    recipe = TextRecipe(WaitingTokenizer(), mask_before=[1])
    preprocess([folder / "in.jsonl"], folder / "out", recipe)


def test_a_killed_command_leaves_the_old_dataset_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["first", "second"])
    run([path], tmp_path, mask_before=[58])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code = "from pathlib import Path; from tests.data.test_preprocess import *;"
    code += f"preprocess_until_killed(Path({str(tmp_path)!r}))"
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert killed.stdout is not None and killed.stdout.readline() == b"ready\n"
    left = {file.name for file in tmp_path.iterdir()} - set(before)
    assert len(left) == 2  # what is half written
    run([path], tmp_path, mask_before=[58])  # beside one that lives
    assert left < {file.name for file in tmp_path.iterdir()}
    killed.kill()
    killed.wait()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    run([path], tmp_path, mask_before=[58])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_input_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "in.txt").write_text("")
    with pytest.raises(DataError, match=r"there is no text in .*in\.jsonl, .*in\.txt"):
        run([tmp_path / "in.jsonl", tmp_path / "in.txt"], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["x" * 100] * 1000)
    with small_disk(tmp_path / "disk", 1 << 16) as mounted:
        with (
            small_files(None if mounted else 1 << 16),
            pytest.raises(DataError, match=r"cannot write .*disk/out: "),
        ):
            run([path], tmp_path / "disk")
        assert list((tmp_path / "disk").iterdir()) == []


def test_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl")
    for keys in (("text", "text"), ("text", "text_label")):
        with pytest.raises(DataError, match="two datasets would take the same name"):
            run([path], tmp_path, keys=keys, mask_before=[58])


def test_a_comma_too_many_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", ["a"])
    write_jsonl(tmp_path / "other.jsonl", ["b"])
    flags = ["--output-prefix", "out", "--tokenizer-type", "CharLevelTokenizer", "--input"]
    preprocess_data.main([*flags, "in.jsonl,"])
    assert texts_of(tmp_path) == ["a"]
    with pytest.raises(SystemExit):
        preprocess_data.main([*flags, ""])
    assert "--input names no file" in capsys.readouterr().err


def test_a_document_of_many_megabytes(tmp_path: Path) -> None:
    text = "It was the age of foolishness\nand of wisdom\n" * 60_000
    (tmp_path / "in.txt").write_text(text)
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    done = preprocess([tmp_path / "in.txt"], tmp_path / "out", TextRecipe(tokenizer))
    assert done.documents == 1
    indexed = open_indexed(str(tmp_path / "out_text_document"))
    assert tokenizer.detokenize(indexed.get(0).tolist()) == text


def test_the_command(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl")
    command = [sys.executable, "tools/preprocess_data.py", "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer-type", "CharLevelTokenizer", "--append-eod", "--workers", "2"]
    done = subprocess.run(
        [*command, "--input", f"{path},{path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 documents" in done.stdout
    assert texts_of(tmp_path) == [f"{text}\0" for text in TEXTS * 2]
    failed = subprocess.run(
        [*command, "--input", "absent.jsonl"], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr == "error: input absent.jsonl does not exist\n"
