"""How a rank finds its place and describes its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neox.cluster.execute import Place, prepare_environment
from neox.cluster.run_folder import End, Job
from neox.cluster.worker import _describe, _find_place, _speak_into
from neox.errors import ConfigError, DataError

VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Place(3, 1, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
            Place(5, 1, 4),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place(2, 0, 2),
        ),
        ({"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Place(1, 1, 2)),
        # Inside a Slurm job, DeepSpeed's own launcher has the last word.
        ({"SLURM_PROCID": "0", "RANK": "3", "LOCAL_RANK": "3"}, Place(3, 3, 1)),
    ],
)
def test_every_launchers_variables_are_understood(
    environment: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _find_place() == place


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
