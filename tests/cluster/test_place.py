"""How a process finds its place among those that srun, an mpirun or torchrun started."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox import log
from neox.cluster.main import main
from neox.cluster.place import Place, Started, find_rank, find_started
from neox.errors import ConfigError
from tests.models import config_of

BATCH = {"SLURM_JOB_ID": "100", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1,2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "far",
    "MASTER_PORT": "4321",
}


@pytest.mark.parametrize(
    ("environ", "started"),
    [
        (SRUN, Started(Place(2, 1, 2), (1, 2), "n1", 20700)),
        (OPENMPI, Started(Place(3, 1, 2), (2, 2), None, None)),
        (OPENMPI | {"MASTER_ADDR": "a"}, Started(Place(3, 1, 2), (2, 2), "a", None)),
        (OPENMPI | BATCH, Started(Place(3, 1, 2), (2, 2), "n1", 20100)),
        # mpirun in a job: srun started its daemons, one a node.
        (SRUN | OPENMPI, Started(Place(3, 1, 2), (2, 2), "n1", 20100)),
        (MPICH, Started(Place(1, 1, 2), (2,), "127.0.0.1", None)),
        (TORCHRUN, Started(Place(1, 1, 2), (2, 2), "far", 4321)),
        # srun --mpi=pmi2 sets these, and not the others of MPICH's.
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3"}, Started(Place(2, 1, 2), (1, 2), "n1", 20700)),
    ],
)
def test_a_process_that_its_user_started_knows_its_place(
    environ: dict[str, str], started: Started
) -> None:
    assert find_started(environ) == started


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"RANK": "0", "WORLD_SIZE": "2"},  # left over from something
        OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_no_run_that_was_started(environ: dict[str, str]) -> None:
    assert find_started(environ) is None


def test_where_ranks_meet() -> None:
    started = find_started(OPENMPI)
    assert started is not None
    with pytest.raises(ConfigError, match="set master_addr to its name, or export MASTER_ADDR"):
        started.meeting_point(config_of())
    assert started.meeting_point(config_of(master_addr="b")) == ("b", 29500)
    inside = find_started(SRUN)
    assert inside is not None and inside.meeting_point(config_of()) == ("n1", 20700)


def test_the_rank_that_our_launcher_gave() -> None:
    assert find_rank({}) is None
    assert find_rank({"RANK": "3", "SLURM_PROCID": "0"}) == 3  # DeepSpeed's launcher in a job
    assert find_rank(SRUN) == 2
    assert find_rank(SRUN | OPENMPI) == 3
    assert find_rank(MPICH) == 1


def test_only_rank_0_tells_of_a_wrong_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_rank", 0)  # put back afterwards
    (tmp_path / "model.yml").write_text("no_such_key: 1\n")
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["train.py", str(tmp_path / "model.yml")]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(["train.py", str(tmp_path / "model.yml")]) == 2
    assert "no_such_key" in capsys.readouterr().err
