"""The manifest notices every changed byte, of a file and of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.checkpoint.manifest import MANIFEST, Entry, Manifest, digest
from neox.errors import CheckpointError


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "configs").mkdir()
    contents = {"layer_00.pt": b"weights" * 9, "configs/small.yml": b"{}", "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    manifest = Manifest(
        tmp_path,
        iteration=7,
        grid={"tp": 2, "pp": 1, "dp": 4},
        padded_vocab_size=64,
        architecture={"num_layers": 2, "num_kv_heads": None, "rotary_pct": 0.25, "norm": "rmsnorm"},
        files={name: digest(tmp_path / name) for name in contents},
    )
    manifest.write()
    return manifest


def test_what_was_written_is_read(manifest: Manifest) -> None:
    assert Manifest.read(manifest.folder) == manifest
    for name in manifest.files:
        manifest.check(manifest.folder / name)
    manifest.check_sizes()


def test_the_checksum_is_the_published_one(tmp_path: Path) -> None:
    """Of no bytes and of "abc", as the reference implementation's xxhsum -H2 prints them."""
    (tmp_path / "none").touch()
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest(tmp_path / "none") == Entry(0, "99aa06d3014798d86001c324468d497f")
    assert digest(tmp_path / "abc") == Entry(3, "06b05ab6733a618578af5f94892f3950")


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None


def test_every_changed_byte_of_the_manifest_is_noticed(manifest: Manifest) -> None:
    path = manifest.folder / MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(whole)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=MANIFEST):
                Manifest.read(manifest.folder)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(manifest.folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"wEights" + b"weights" * 8), "checksum"),
        (lambda path: path.write_bytes(b"weights" * 8), "has 56 bytes and was written with 63"),
        (lambda path: path.write_bytes(b"weights" * 9 + b"\0"), "has 64 bytes"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flip", "short", "long", "missing"],
)
def test_damage_is_named(manifest: Manifest, spoil, said: str) -> None:
    path = manifest.folder / "layer_00.pt"
    spoil(path)
    with pytest.raises(CheckpointError, match=rf"layer_00\.pt.* {said}"):
        manifest.check(path)
    if said != "checksum":
        with pytest.raises(CheckpointError, match=rf"layer_00\.pt.* {said}"):
            manifest.check_sizes("layer_*")
    manifest.check_sizes("configs/*")


def test_a_file_that_the_manifest_does_not_list(manifest: Manifest) -> None:
    (manifest.folder / "layer_01.pt").touch()
    with pytest.raises(CheckpointError, match=r"layer_01\.pt is not part of the checkpoint"):
        manifest.check(manifest.folder / "layer_01.pt")


def test_a_manifest_of_a_newer_program(manifest: Manifest) -> None:
    path = manifest.folder / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"has format 2 and this program reads format 1"):
        Manifest.read(manifest.folder)
