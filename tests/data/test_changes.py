"""A resumed run is told when its data or their order changed, and only then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from neox.data.changes import order_facts, warn_of_change
from neox.data.loaders import build_loaders
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import training_config, write_dataset

LENGTHS = [60, 10, 33, 90, 25, 47, 80, 9, 40, 50]


def facts(folder: Path, **values) -> dict:
    config = training_config(folder, **values)
    loader = build_loaders(config, ProcessGroups.single(), 0, 0).train
    assert loader is not None
    found = order_facts(config, loader)
    assert len(json.dumps(found)) < 1000
    return json.loads(json.dumps(found))  # as a checkpoint gives it back


@pytest.fixture
def before(tmp_path: Path, capsys) -> dict:
    write_dataset(tmp_path / "data", LENGTHS)
    found = facts(tmp_path)
    capsys.readouterr()
    return found


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": 8}, "seed 7 -> 8"),
        ({"split": "1,1"}, "data.documents[1] 8 -> 5"),
        ({"train_iters": 100}, "data.epochs 1 -> 10"),
        ({"gradient_accumulation_steps": 3}, "train_batch_size 4 -> 6"),
        ({"pack_impl": "unpacked"}, "pack_impl packed -> unpacked"),
    ],
)
def test_a_change_is_told(before: dict, tmp_path: Path, capsys, values: dict, told: str) -> None:
    warn_of_change(before, facts(tmp_path, **values))
    warned = capsys.readouterr().err
    assert "is not the one that the checkpoint was trained on" in warned
    assert told in warned


def test_other_content_is_told(before: dict, tmp_path: Path, capsys) -> None:
    write_dataset(tmp_path / "data", LENGTHS, first=1)
    warn_of_change(before, facts(tmp_path))
    assert f"data.text {before['data']['text']} -> " in capsys.readouterr().err


def test_another_blend_is_told(tmp_path: Path, capsys) -> None:
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        write_dataset(Path(path), LENGTHS)

    def blended(count: int, **values) -> dict:
        data = {f"{split}_data_paths": paths[:count] for split in ("train", "valid", "test")}
        return facts(tmp_path, data_path=None, split=None, **data, **values)

    two = blended(2)
    warn_of_change(two, blended(2, train_data_weights=[1.0, 3.0]))
    assert "data.weights[0] 0.5 -> 0.25; data.weights[1] 0.5 -> 0.75" in capsys.readouterr().err
    warn_of_change(two, blended(3))
    assert "data.datasets: 2 -> 3" in capsys.readouterr().err
    warn_of_change(two, blended(2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train_iters": 7},
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4},
        {"num_workers": 0, "mmap_warmup": True, "eval_interval": 1},
    ],
)
def test_what_changes_nothing_is_not_told(before: dict, tmp_path: Path, capsys, values) -> None:
    warn_of_change(before, facts(tmp_path, **values))
    assert capsys.readouterr().err == ""


def test_data_may_move(before: dict, tmp_path: Path, capsys) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in tmp_path.glob("data.*"):
        shutil.copyfile(file, elsewhere / file.name)
    warn_of_change(before, facts(elsewhere))
    assert capsys.readouterr().err == ""
