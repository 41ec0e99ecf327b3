"""The order of samples on disk: kept, found again, never believed when it is not what it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neox import atomic
from neox.data.documents import open_documents
from neox.data.indexed import bin_path, idx_path
from neox.data.samples import open_samples
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import training_config, write_dataset

LENGTHS = [50, 40, 30]


def read(folder: Path, *, labels: str | None = None, chosen: range | None = None, **values):
    """int64 [N, seq_length + 1]: the first samples of a dataset."""
    config = training_config(folder, **values)
    label_prefix = str(folder / labels) if labels else None
    documents = open_documents(str(folder / "data"), label_prefix)
    chosen = chosen or range(len(documents))
    samples = open_samples(documents, chosen, 5, config, ProcessGroups.single())
    return np.stack([samples[n].tokens_T for n in range(5)])


def cached(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in (folder / "index_cache").iterdir()}


CHANGES: dict[str, dict] = {
    "seed": {"seed": 8},
    "seq": {"seq_length": 7},
    "packing": {"pack_impl": "pack_until_overflow", "allow_chopped": False, "seq_length": 64},
    "chopped": {"pack_impl": "pack_until_overflow", "seq_length": 32},
    "not chopped": {"pack_impl": "pack_until_overflow", "seq_length": 32, "allow_chopped": False},
    "unpacked": {"pack_impl": "unpacked", "seq_length": 32},
    "range": {"chosen": range(2)},
    "labels": {"labels": "labels"},
    "other labels": {"labels": "labels2"},
}


def test_everything_an_order_depends_on_makes_another_cache(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    write_dataset(tmp_path / "labels", LENGTHS)
    write_dataset(tmp_path / "labels2", LENGTHS, first=1)
    read(tmp_path)
    sets = 1
    for change in CHANGES.values():
        values = {"max_position_embeddings": 64, **change}
        read(tmp_path, **values)
        sets += 1
        assert len(list((tmp_path / "index_cache").glob("*.json"))) == sets, change
        before = cached(tmp_path)
        read(tmp_path, **values)
        assert cached(tmp_path) == before, f"{change} was built twice"


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_rewritten_dataset_of_the_same_size_is_seen(tmp_path: Path, keep_time: bool) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    before = read(tmp_path)
    times = [path(tmp_path / "data").stat() for path in (idx_path, bin_path)]
    write_dataset(tmp_path / "data", LENGTHS[::-1])
    if keep_time:  # as rsync --times leaves it
        for path, stat in zip((idx_path, bin_path), times, strict=True):
            os.utime(path(tmp_path / "data"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    read(tmp_path)
    assert len(list((tmp_path / "index_cache").glob("*.json"))) == 2
    assert not np.array_equal(read(tmp_path), before)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damage_key(about: Path) -> None:
    told = json.loads(about.read_text())
    told["key"]["seed"] += 1
    about.write_text(json.dumps(told))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut off": ("starts.npy", lambda f: f.write_bytes(f.read_bytes()[:140]), "is damaged"),
    "emptied": ("starts.npy", lambda f: f.write_bytes(b""), "is damaged"),
    "a bit": ("documents.npy", lambda f: flip(f, -1), "is damaged"),
    "its header": ("documents.npy", lambda f: flip(f, 0), "is damaged"),
    "gone": ("documents.npy", lambda f: f.unlink(), "is missing"),
    "no json": (".json", lambda f: f.write_text("{"), "is damaged"),
    "other json": (".json", lambda f: f.write_text("[]"), "is damaged"),
    "another key": (".json", damage_key, "belongs to other data"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_order_is_built_anew_and_said(tmp_path: Path, capsys, name: str) -> None:
    ending, damage, message = DAMAGE[name]
    write_dataset(tmp_path / "data", LENGTHS)
    expected = read(tmp_path)
    (file,) = (tmp_path / "index_cache").glob(f"*{ending}")
    damage(file)
    capsys.readouterr()
    assert np.array_equal(read(tmp_path), expected)
    warned = capsys.readouterr().err
    assert message in warned and "built anew" in warned
    assert np.array_equal(read(tmp_path), expected)
    assert capsys.readouterr().err == ""


def test_a_damaged_order_in_a_read_only_folder_is_built_elsewhere(tmp_path: Path, capsys) -> None:
    write_dataset(tmp_path / "data", LENGTHS)
    expected = read(tmp_path)
    (starts,) = (tmp_path / "index_cache").glob("*-starts.npy")
    flip(starts, -1)
    tmp_path.chmod(0o555)
    try:
        for _ in range(2):
            assert np.array_equal(read(tmp_path, log_dir=str(tmp_path / "logs")), expected)
            assert "starts.npy is damaged" in capsys.readouterr().err
    finally:
        tmp_path.chmod(0o755)
    assert len(list((tmp_path / "logs" / "index_cache").glob("*.json"))) == 1


def test_a_full_disk_keeps_no_part_of_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write_dataset(tmp_path / "data", LENGTHS)

    def full(path: Path, text: str) -> None:
        if path.parent.parent == tmp_path:
            raise OSError(28, "No space left on device")
        atomic.write_text(path, text)

    monkeypatch.setattr("neox.data.cache.write_text", full)
    read(tmp_path, log_dir=str(tmp_path / "logs"))
    assert list((tmp_path / "index_cache").iterdir()) == []
    assert len(list((tmp_path / "logs" / "index_cache").iterdir())) == 3
    assert "cannot keep the sample order in" in capsys.readouterr().out


def test_an_order_without_its_json_is_not_used(tmp_path: Path) -> None:
    """As an interrupted run leaves it: the .json is written last."""
    write_dataset(tmp_path / "data", LENGTHS)
    expected = read(tmp_path)
    (about,) = (tmp_path / "index_cache").glob("*.json")
    about.unlink()
    (starts,) = (tmp_path / "index_cache").glob("*-starts.npy")
    flip(starts, -1)
    assert np.array_equal(read(tmp_path), expected)
    assert about.is_file()
