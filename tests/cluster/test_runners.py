"""The commands that start ranks, and what they begin with."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neox.cluster import runners
from neox.cluster.environment import for_other_hosts, write_start
from neox.cluster.run_folder import RUN_FOLDER, Job
from neox.cluster.runners import WORKER, command_over_hosts, find_program, local_command
from neox.errors import ConfigError
from tests.models import config_of

HOSTS = {"b": [0, 1], "a": [3]}
JOB = Job("train", None, "cpu", 3, "10.0.0.1", 29512, "here", hosts=HOSTS)


def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, **values: Any
) -> list[str]:
    """The launcher's own command, without the shell around it."""
    monkeypatch.setattr(runners, "find_program", lambda name: f"/bin/{name}")
    made = command_over_hosts(HOSTS, JOB, config_of(3, launcher=launcher, **values), folder)
    assert made[:2] == ["/bin/sh", "-c"] and made[4] == str(folder / "launcher.log")
    assert (folder / "tasks").read_text() == "b\nb\na\n"
    return made[5:]


def test_one_machine_is_started_by_deepspeeds_launcher() -> None:
    made = local_command({"localhost": [0, 2]}, JOB)
    (hosts,) = [word.partition("=")[2] for word in made if word.startswith("--world_info")]
    assert made[1:3] == ["-m", "deepspeed.launcher.launch"]
    assert json.loads(base64.urlsafe_b64decode(hosts)) == {"localhost": [0, 2]}
    assert made[made.index("--master_port") + 1] == "29512"


def test_pdsh_starts_deepspeeds_launcher_on_every_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    made = command(folder, monkeypatch, "pdsh")
    assert made[:2] == ["/bin/pdsh", "-S"] and made[made.index("-w") + 1] == "b,a"
    words = shlex.split(made[-1])  # as the host's shell takes it apart
    assert words[:2] == ["/bin/sh", str(folder / "start")]
    assert words[2:5] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert "--node_rank=%n" in words and words[-2:] == [str(WORKER), str(folder)]


def test_srun_gets_the_host_of_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = command(tmp_path, monkeypatch, "slurm", account="me", comment="two words")
    options = made[1 : made.index("/bin/sh")]
    expected = ["--distribution=arbitrary", "--ntasks=3", "--nodes=2", "--account=me"]
    assert {f"--nodelist={tmp_path}/tasks", "--comment=two words", *expected} <= set(options)
    worker = [sys.executable, "-u", str(WORKER), str(tmp_path)]
    assert made[-6:] == ["/bin/sh", str(tmp_path / "start"), *worker]


def test_mpirun_gets_the_host_of_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = " ".join(command(tmp_path, monkeypatch, "openmpi"))
    assert f" -n 3 --hostfile {tmp_path}/tasks --map-by seq --bind-to none /bin/sh " in line
    for launcher in ("mpich", "mvapich", "impi"):
        line = " ".join(command(tmp_path, monkeypatch, launcher))
        quiet = "" if launcher == "impi" else "-disable-auto-cleanup "
        start = f"/bin/{launcher} -n 3 -launcher ssh -hosts b:2,a:1 {quiet}/bin/sh "
        assert line.startswith(start)


def program(folder: Path, name: str, says: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)


def test_an_mpirun_is_known_by_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs its mpirun, which is not here; .*install mpich"):
        find_program("mpich")
    program(tmp_path, "mpirun", "mpirun (Open MPI) 4.1.4")
    assert find_program("openmpi") == str(tmp_path / "mpirun")
    with pytest.raises(ConfigError, match=r"not here \(.*is 'mpirun \(Open MPI\) 4.1.4'\)"):
        find_program("mpich")
    program(tmp_path, "mpiexec.hydra", "HYDRA build details:")
    assert find_program("mpich") == str(tmp_path / "mpiexec.hydra")
    with pytest.raises(ConfigError, match="launcher: pdsh needs the program pdsh"):
        find_program("pdsh")


def test_other_hosts_get_what_a_run_needs(tmp_path: Path) -> None:
    (tmp_path / "more").write_text("# a comment\nEXTRA = x=y \nnonsense\n")
    needed = {"PYTHONPATH": "p", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "LOGLEVEL": "debug"}
    needed |= {"NEOX_CACHE": "c", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "https_proxy": "h"}
    needed |= {"DS_ENV_FILE": str(tmp_path / "more")}
    others = {"HOSTNAME": "h", "SSH_AUTH_SOCK": "s", "SLURM_PROCID": "0", "TMPDIR": "/scratch/1"}
    others |= {"CUDA_VISIBLE_DEVICES": "0", "RANK": "0", RUN_FOLDER: "another"}
    others |= {"NEOX_A.B": "no name in a shell, which would end"}
    assert for_other_hosts(needed | others) == needed | {"EXTRA": "x=y"}
    with pytest.raises(ConfigError, match="DS_ENV_FILE is /none, which is not a file"):
        for_other_hosts({"DS_ENV_FILE": "/none"})
    (tmp_path / "more").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="more cannot be read as text"):
        for_other_hosts(needed)


def test_a_process_begins_in_this_folder_with_these_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    value = 'it\'s "$HOME"\n`two` lines, and \udcff, a byte that is no text'
    start = write_start(tmp_path, {"NEOX_X": value})
    assert start.stat().st_mode & 0o777 == 0o600
    show = "import os; print([os.getcwd(), os.environ['NEOX_X'], os.environ['NEOX_RUN_FOLDER']])"
    words = ["/bin/sh", str(start), sys.executable, "-c", show]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == f"{[str(tmp_path), value, str(tmp_path)]}\n", done.stderr
