"""Corpora by name: the table, tools/fetch.py and tools/prepare_data.py against a local server."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import pytest

from neox.data.corpus import find_files
from neox.data.indexed import open_indexed
from neox.errors import DataError
from tests import small_tokenizer
from tests.tools.server import Site, serving
from tools import fetch, prepare_data
from tools.corpora import read_corpora

UPSTREAMS = [
    *("enron", "pile_subset", "pile", "github", "arxiv", "europarl", "freelaw", "nih", "pubmed"),
    *("books1", "books3", "hackernews", "openwebtext2", "stackexchange", "ubuntu_irc"),
    *("youtube_subtitles", "c4", "c4_openwebtext", "enwik8"),
]
TEXT = "It was the best of times,\nit was the worst of times;" * 800


def zipped(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def jsonl_gz(*texts: str) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


@pytest.fixture
def corpora(
    site: Site, mirror: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict]:
    """A table of our own in NEOX_CORPORA; `write` puts it there again once it was changed."""
    site.files |= {"/c/enwik8.zip": zipped("enwik8", TEXT)}
    site.files |= {f"/c/part{n:02}.json.gz": jsonl_gz(f"a{n}", f"b{n}") for n in range(3)}
    table = {
        "enwik8": {"urls": [f"{site.url}/c/enwik8.zip"], "documents": 1},
        "parts": {"urls": f"{site.url}/c/part{{shard:02}}.json.gz", "shards": 3, "folder": "p"},
        "mirrored": {"urls": [f"{site.url}/gone/x.txt", f"{mirror.url}/x.txt"]},
    }
    mirror.files["/x.txt"] = TEXT.encode()
    monkeypatch.setenv("NEOX_CORPORA", str(tmp_path / "corpora.json"))
    monkeypatch.chdir(tmp_path)
    write(table)
    return table


def write(table: dict[str, dict]) -> None:
    Path("corpora.json").write_text(json.dumps(table))


def run_fetch(*arguments: object) -> int:
    return fetch.main([str(argument) for argument in arguments], wait=lambda seconds: None)


def prepare(*arguments: object) -> int:
    words = [str(argument) for argument in (*arguments, "--workers", 1)]
    return prepare_data.main(words, wait=lambda seconds: None)


def texts_of(prefix: str) -> list[str]:
    indexed = open_indexed(prefix)
    return [bytes(indexed.get(n).astype("uint8")).decode() for n in range(len(indexed))]


def test_the_table_has_upstreams_names_and_readable_files(tmp_path: Path) -> None:
    corpora = read_corpora()
    assert list(corpora) == [*UPSTREAMS, "gpt2-vocab", "gpt2-merges"]
    assert [len(corpora[name].files()) for name in ("pile", "c4", "c4_openwebtext")] == [
        30, 1024, 512,
    ]  # fmt: skip
    assert corpora["pile_subset"].folder == "pile_00"
    for name in UPSTREAMS:
        file = tmp_path / next(iter(corpora[name].files()))
        file.touch()
        assert find_files([file]) == [file]  # it can be tokenized


def test_a_corpus_is_fetched_and_tokenized(
    corpora: dict, site: Site, capsys: pytest.CaptureFixture
) -> None:
    assert prepare("enwik8", "-t", "CharLevelTokenizer", "-d", "here") == 0
    assert texts_of("here/enwik8/enwik8_text_document") == [TEXT + "\0"]
    out = capsys.readouterr().out
    assert "wrote here/enwik8/enwik8_text_document.bin and .idx" in out
    site.requests.clear()
    assert prepare("ENWIK8", "-t", "CharLevelTokenizer", "-d", "here") == 0
    assert not site.requests  # upstream's is not asked again either
    assert prepare("enwik8", "-t", "CharLevelTokenizer", "-d", "here", "-f") == 0
    assert len(site.gets("/c/enwik8.zip")) == 1


def test_shards_become_one_dataset_in_order(corpora: dict) -> None:
    assert prepare("parts", "-t", "CharLevelTokenizer") == 0
    expected = [f"{letter}{n}\0" for n in range(3) for letter in "ab"]
    assert texts_of("data/p/p_text_document") == expected


def test_gpt2s_files_are_fetched_where_none_are_named(
    corpora: dict, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vocab, merges = small_tokenizer.train(["<|endoftext|>"]).model.save(str(tmp_path))
    for name, path in (("gpt2-vocab", vocab), ("gpt2-merges", merges)):
        url = f"/hub/{name}{Path(path).suffix}"
        site.files[url] = Path(path).read_bytes()
        corpora[name] = {"urls": [site.url + url]}
    write(corpora)
    assert prepare("enwik8") == 0
    assert {path.name for path in Path("data").iterdir()} == {
        "enwik8", "gpt2-vocab.json", "gpt2-merges.txt", "fetched.json",
    }  # fmt: skip
    assert open_indexed("data/enwik8/enwik8_text_document").get(0)[-1] == 0
    site.requests.clear()
    assert prepare("enwik8", "-v", vocab, "-m", merges) == 0
    assert prepare("enwik8") == 0
    assert not site.requests
    assert prepare("enwik8", "-v", vocab) == 2
    assert "needs both -v and -m" in capsys.readouterr().err


def test_a_dead_address_is_passed_over(corpora: dict, mirror: Site) -> None:
    assert run_fetch("mirrored") == 0
    assert Path("data/mirrored/x.txt").read_text() == TEXT
    assert len(mirror.gets("/x.txt")) == 1


def test_a_mirror_is_asked_first(corpora: dict, site: Site, mirror: Site) -> None:
    mirror.files["/m/enwik8.zip"] = site.files["/c/enwik8.zip"]
    assert run_fetch("enwik8", "--mirror", f"{mirror.url}/m/") == 0
    assert mirror.gets("/m/enwik8.zip") and not site.requests


def test_what_was_interrupted_goes_on(corpora: dict, site: Site) -> None:
    size = len(site.files["/c/enwik8.zip"])
    site.faults["/c/enwik8.zip"] = [("drop", size // 2), ("status", 503, {}), ("reset", 10)]
    assert prepare("enwik8", "-t", "CharLevelTokenizer") == 0
    ranges = [request.range for request in site.gets("/c/enwik8.zip")]
    assert ranges[0] is None and ranges[1] == f"bytes={size // 2}-"
    assert texts_of("data/enwik8/enwik8_text_document") == [TEXT + "\0"]


def test_the_checksum_of_the_table_is_compared(
    corpora: dict, site: Site, capsys: pytest.CaptureFixture
) -> None:
    body = site.files["/c/enwik8.zip"]
    corpora["enwik8"]["sha256"] = hashlib.sha256(body).hexdigest()
    write(corpora)
    site.faults["/c/enwik8.zip"] = [("flip",)]
    assert run_fetch("enwik8") == 0
    said = capsys.readouterr()
    assert "its sha256 is" in said.err and "the checksum is right" in said.out
    target = Path("data/enwik8/enwik8.zip")
    target.write_bytes(body[:-1])
    assert run_fetch("enwik8") == 0
    assert "is not what is published" in capsys.readouterr().err
    assert target.read_bytes() == body
    target.unlink()
    site.files["/c/enwik8.zip"] = body[::-1]
    assert run_fetch("enwik8") == 2
    assert "it arrived damaged, twice" in capsys.readouterr().err
    assert not target.exists()


def test_offline_the_file_to_place_is_named_and_taken(
    corpora: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with serving(Site()) as closed:
        pass
    corpora["enwik8"]["urls"] = [f"{closed.url}/enwik8.zip"]
    write(corpora)
    assert prepare("enwik8", "-t", "CharLevelTokenizer") == 2
    error = capsys.readouterr().err
    assert "enwik8.zip is on no server" in error and f"{closed.url}/enwik8.zip: " in error
    (place,) = re.findall(r"Put the file at (\S+) by hand", error)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_bytes(zipped("enwik8", "by hand"))
    assert prepare("enwik8", "-t", "CharLevelTokenizer") == 0
    assert texts_of("data/enwik8/enwik8_text_document") == ["by hand\0"]
    assert "1 in place before" in capsys.readouterr().out


def test_another_address(corpora: dict, site: Site, capsys: pytest.CaptureFixture) -> None:
    site.files["/other/part7.json.gz"] = jsonl_gz("other")
    url = f"{site.url}/other/part7.json.gz?download=true"
    site.files["/other/part7.json.gz?download=true"] = jsonl_gz("other")
    assert prepare("enwik8", "-t", "CharLevelTokenizer", "--url", url) == 0
    assert texts_of("data/enwik8/enwik8_text_document") == ["other\0"]
    assert prepare("mine", "-t", "CharLevelTokenizer", "--url", url) == 0
    assert texts_of("data/mine/mine_text_document") == ["other\0"]
    assert prepare("mine", "-t", "CharLevelTokenizer") == 2
    assert "mine is none of enron, pile_subset" in capsys.readouterr().err
    assert run_fetch("own/small", "--url", url) == 2
    assert "own/small is a model" in capsys.readouterr().err


def test_a_dry_run_lists(corpora: dict, capsys: pytest.CaptureFixture) -> None:
    assert run_fetch("parts", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == [f"part0{n}.json.gz" for n in range(3)]
    assert lines[3].endswith("3 files, to data/p")
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "urls is needed"),
        ({"urls": ["http://h/x"], "sha": "1"}, "urls is needed; there may be documents, folder"),
        ({"urls": ["ftp://h/x"]}, "not the address of a file"),
        ({"urls": ["http://h/"]}, "not the address of a file"),
        ({"urls": ["http://h/x{n}"]}, "braces other than {shard}"),
        ({"urls": ["http://h/x{shard.n}"]}, "braces other than {shard}"),
        ({"urls": 5}, "urls is 5, an address or a list"),
        ({"urls": ["http://h/x"], "shards": 2}, "names 1 files, and there are 2 shards"),
        ({"urls": ["http://h/{shard}/x"], "shards": 2}, "the file's name needs {shard}"),
        ({"urls": ["http://h/x"], "shards": "two"}, "shards is 'two', a number"),
        ({"urls": ["http://h/x"], "sha256": "12"}, "sha256 is 64 of"),
        (["http://h/x"], "urls is needed"),
    ],
)
def test_a_table_that_cannot_be(tmp_path: Path, entry: object, said: str) -> None:
    path = tmp_path / "t.yml"
    path.write_text(json.dumps({"mine": entry}))
    with pytest.raises(DataError, match=re.escape(f"{path}: mine: ") + ".*" + re.escape(said)):
        read_corpora(path)


def test_a_table_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_fetch("enwik8", "--corpora", tmp_path / "absent.yml") == 2
    assert "absent.yml cannot be read" in capsys.readouterr().err
    (tmp_path / "list.yml").write_text("- a\n")
    assert run_fetch("enwik8", "--corpora", tmp_path / "list.yml") == 2
    assert "is no table of corpora" in capsys.readouterr().err
