"""Every kind of file, archives inside archives, and what happens when one is damaged."""

from __future__ import annotations

import bz2
import gc
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from neox.data.corpus import find_files, read_chunks
from neox.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def texts_of(*inputs: Path) -> list[str]:
    return [
        text
        for chunk in read_chunks(find_files(inputs))
        for record in chunk.records()
        for text in record.texts(["text"])
    ]


def dat(*texts: str) -> bytes:
    return b"".join(b"%016d" % len(text.encode()) + text.encode() for text in texts)


BOTH = ["naïve", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(*BOTH)),
        ("a.json", jsonl(*BOTH)),
        ("a.jsonl.gz", gzip.compress(jsonl(*BOTH))),
        ("a.json.gz", gzip.compress(jsonl(*BOTH))),
        ("a.jsonl.zst", zstd.compress(jsonl(*BOTH))),
        ("a.jsonl.xz", lzma.compress(jsonl(*BOTH))),
        ("a.jsonl.bz2", bz2.compress(jsonl(*BOTH))),
        # Several streams one after the other, as `cat` makes them.
        ("a.jsonl.gz", b"".join(gzip.compress(jsonl(text)) for text in BOTH)),
        ("a.jsonl.zst", b"".join(zstd.compress(jsonl(text)) for text in BOTH)),
        ("a.jsonl", "".join(json.dumps(text) + "\n" for text in BOTH).encode()),
        # lm_dataformat's own
        ("a.json.zst", zstd.compress(json.dumps(BOTH).encode())),
        ("a.json", json.dumps([{"text": text} for text in BOTH], indent=1).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(BOTH).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(*BOTH).replace(b"\n", b"\r\n")),
        ("a.dat.zst", zstd.compress(dat(*BOTH))),
        (
            "a.jsonl.zst.tar",
            tar({f"{text[0]}.jsonl.zst": zstd.compress(jsonl(text)) for text in BOTH}),
        ),
        ("a.tar.gz", gzip.compress(tar({"x/1.txt": BOTH[0].encode(), "x/2": BOTH[1].encode()}))),
        ("a.tgz", gzip.compress(tar({"x.jsonl": jsonl(*BOTH)}))),
        (
            "a.tar.xz",
            lzma.compress(tar({"in.tar.xz": lzma.compress(tar({"x.jsonl": jsonl(*BOTH)}))})),
        ),
        (
            "a.tar.zst",
            zstd.compress(tar({"._x": b"\xff", "x.jsonl.gz": gzip.compress(jsonl(*BOTH))})),
        ),
        (
            "a.zip",
            zipped({"enwik8": BOTH[0].encode(), "__MACOSX/x": b"\xff", "y.jsonl": jsonl(BOTH[1])}),
        ),
        ("a.tar", tar({"x.zip": zipped({"1.txt": BOTH[0].encode()}), "y.txt": BOTH[1].encode()})),
    ],
)
def test_each_format(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path) == BOTH


def test_many_small_texts_share_a_chunk_and_keep_their_order(tmp_path: Path) -> None:
    members = {f"{n:04}.txt": f"text {n}".encode() for n in range(2000)}
    members["1000.u.jsonl"] = jsonl("a line between")
    (tmp_path / "a.tar").write_bytes(tar(dict(sorted(members.items()))))
    (tmp_path / "b.txt").write_text("the end")
    texts = texts_of(tmp_path)
    assert texts == [
        *(f"text {n}" for n in range(1001)),
        "a line between",
        *(f"text {n}" for n in range(1001, 2000)),
        "the end",
    ]
    assert len(list(read_chunks(find_files([tmp_path])))) == 3


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(*["x" * 99] * 20000)))
    counts = [chunk.bytes_read for chunk in read_chunks(find_files([tmp_path]))]
    assert counts == sorted(counts) and len(counts) > 4
    assert counts[-1] == sum(file.stat().st_size for file in tmp_path.iterdir())


def with_wrong_checksum(archive: bytes) -> bytes:
    """The checksum of the first member stands in its header and in the table of contents."""
    return archive.replace(archive[14:18], bytes(4))


MANY = jsonl(*(f"{n} {hash(str(n))}" for n in range(60_000)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(MANY)[:-1000],
            r"a\.jsonl\.gz is damaged .* after line \d\d\d",
        ),
        (
            "a.jsonl.zst",
            zstd.compress(MANY)[:-1000],
            r"a\.jsonl\.zst is damaged .* after line \d\d\d",
        ),
        (
            "a.jsonl.xz",
            lzma.compress(MANY)[:-1000],
            r"a\.jsonl\.xz is damaged .* after line \d\d\d",
        ),
        ("a.tar", tar({"x.jsonl": MANY})[:2_000_000], r"a\.tar/x\.jsonl is damaged .* after line"),
        ("a.tar", b"no archive" * 100, r"a\.tar is damaged"),
        ("a.zip", zipped({"x.jsonl": MANY})[:-30], r"a\.zip is damaged"),
        ("a.zip", with_wrong_checksum(zipped({"x.txt": b"text"})), r"a\.zip/x\.txt is damaged"),
        ("a.dat", dat("abc")[:-1], r"a\.dat is damaged .* 3 bytes were expected, 2 are left"),
        ("a.dat", b"x" * 20, r"a length of 16 digits was expected"),
        ("a.tar", tar({"x": b"\xff"}), r"a\.tar/x is not UTF-8"),
        (
            "a.tar",
            tar({"x.jsonl": b'{"text": "a"}\n{\n'}),
            r"a\.tar/x\.jsonl:2, column 2: not JSON",
        ),
        ("a.json", b'[{"text": "a"},', r"a\.json: not a JSON array"),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1: a JSON object is needed, this is a list"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1"),
        ("a.json", b"[" * 100_000, r"a\.json: not a JSON array"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not JSON that Python reads"),
        ("a.dat", b"9" * 16 + b"x", r"a\.dat is damaged .* does not fit into memory"),
        ("a.csv", b"a,b", r"the name must end in \.jsonl"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name)


def test_files_of_an_archive_are_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({f"{n}.jsonl": jsonl("a") for n in range(100)}))
    for _ in read_chunks([tmp_path / "a.tar"]):
        assert sum(isinstance(thing, tarfile.TarInfo) for thing in gc.get_objects()) < 10


def test_links_and_devices_in_archives_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.FIFOTYPE, "")):
            member = tarfile.TarInfo("../../outside.txt")
            member.type, member.linkname = kind, target
            archive.addfile(member)
        member = tarfile.TarInfo("../inside.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert texts_of(tmp_path / "a.tar") == ["text"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]
