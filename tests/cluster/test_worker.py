"""How a rank finds its place and describes its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neox.cluster import execute
from neox.cluster.execute import prepare_environment
from neox.cluster.place import Place
from neox.cluster.run_folder import End, Job
from neox.cluster.worker import _describe, _speak_into
from neox.errors import ConfigError, DataError

JOB = Job("train", None, None, 3, "a", 29500, "a", hosts={"a": [0], "b": [2, 3]})


def test_places_follow_from_the_plan() -> None:
    assert [JOB.place(rank) for rank in range(3)] == [Place(0), Place(1, 0, 2), Place(2, 1, 2)]
    assert [JOB.slots(rank) for rank in range(3)] == [[0], [2, 3], [2, 3]]


def test_devices_are_those_of_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(execute, "cuda_driver", lambda: True)
    prepare_environment(JOB, JOB.place(1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (DataError("no data"), End(2, error=True, message="no data")),
        (SystemExit(), End(0)),
        (SystemExit(3), End(3)),
        (BrokenPipeError(), End(141, error=True, message="standard output was closed")),
        (SystemExit("a message"), End(1, error=True, message="a message")),
    ],
)
def test_last_words(error: BaseException, end: End) -> None:
    assert _describe(error) == end


def test_a_log_dir_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"log_dir: .*rank_1\.log cannot be written: Not a dir"):
        _speak_into(tmp_path / "file" / "logs" / "rank_1.log")


def test_libraries_find_a_home_where_the_environment_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {"PATH": os.environ["PATH"]}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(Job("train", None, "cpu", 1, "127.0.0.1", 1, "here"), Place())
    assert Path(environment["HOME"]).is_dir()
