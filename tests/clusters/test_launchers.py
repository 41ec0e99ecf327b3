"""train.py, generate.py and evaluate.py over two hosts, by each launcher, are as on one host."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.cluster import Cluster, Host
from tests.clusters.model import DEEPY, ITERATIONS, PYTHON, losses, write_folder

LAUNCHERS = ("pdsh", "slurm", "openmpi", "mpich")
KEY = "a-key-that-nobody-may-see"
_SCRIPT = """
import os, pathlib, socket, time
names = "WANDB_API_KEY", "COMET_API_KEY", "NCCL_X", "HF_TOKEN", "LOCAL_RANK", "FROM_FILE"
found = [socket.gethostname(), os.getcwd(), *map(os.environ.get, names)]
pathlib.Path("seen_" + os.environ["RANK"]).write_text(" ".join(found))
while not pathlib.Path("go").exists():
    time.sleep(0.1)
"""
PATIENCE_S = 280.0  # on two cores that do much else


@pytest.fixture(scope="module")
def folder(cluster: Cluster) -> Path:
    """A model to train over hosts that the file `hosts` lists."""
    folder = cluster.folder / "work folder"
    write_folder(folder)
    return folder


def deepy(host: Host, folder: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """What a run printed, which ended well and said nothing on standard error."""
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*prefix, PYTHON, DEEPY, *arguments]
    done = host.run(command, cwd=folder, env=env, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_host(cluster: Cluster, folder: Path) -> list[float]:
    """The losses of one host; its checkpoint is in the folder `saved`."""
    sets = ("num_gpus=4", "log_dir=one", "save=saved")
    words = [word for text in sets for word in ("--set", text)]
    deepy(cluster["alpha"], folder, "train.py", "model.yml", *words)
    found = losses(folder / "one")
    assert len(found) == ITERATIONS
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_over_two_hosts_has_the_losses_of_one(
    cluster: Cluster, folder: Path, one_host: list[float], launcher: str
) -> None:
    host = "beta" if launcher == "slurm" else "alpha"
    sets = [f"launcher={launcher}", f"log_dir={launcher}"]
    words = [word for text in sets for word in ("--set", text)]
    printed = deepy(cluster[host], folder, "train.py", "model.yml", "-H", "hosts", *words)
    assert losses(folder / launcher) == pytest.approx(one_host, abs=1e-6)
    lines = printed.splitlines()
    assert lines[0].startswith("model: ")
    assert sum("| iteration " in line for line in lines) == ITERATIONS
    assert not [line for line in lines if "alpha" in line or "beta" in line or "WARN" in line]
    logs = sorted(path.name for path in (folder / launcher).glob("*.log"))
    expected = ["alpha_rank_0", "alpha_rank_1", "beta_rank_2", "beta_rank_3"]
    assert logs == [f"{name}.log" for name in expected]
    assert (folder / launcher / "alpha_rank_0.log").read_text() == printed
    assert not list(folder.glob("neox-run-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_generation_over_two_hosts(
    cluster: Cluster, folder: Path, one_host: list[float], launcher: str
) -> None:
    words = ("generate.py", "model.yml", "--set", "load=saved", "-i", "prompts.txt", "-o")
    texts = []
    for name, where in (
        ("one", ("--set", "num_gpus=4")),
        (launcher, ("-H", "hosts", "--set", f"launcher={launcher}")),
    ):
        if not (folder / f"{name}.jsonl").exists():
            deepy(cluster["alpha"], folder, *words, f"{name}.jsonl", *where)
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["text"] for line in lines])
    assert texts[0] == texts[1] and len(texts[0]) == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_evaluation_over_two_hosts(
    cluster: Cluster, folder: Path, one_host: list[float], launcher: str
) -> None:
    words = ("evaluate.py", "model.yml", "--set", "load=saved", "--eval_tasks", "sums")
    words += ("--include_path", ".", "--set", "eval_use_cache=false")
    results = []
    for name, where in (
        ("one", ("--set", "num_gpus=4")),
        (launcher, ("-H", "hosts", "--set", f"launcher={launcher}")),
    ):
        prefix = f"eval_{name}"
        if not list(folder.glob(f"{prefix}*.json")):
            deepy(cluster["alpha"], folder, *words, "--eval_results_prefix", prefix, *where)
        (path,) = folder.glob(f"{prefix}*.json")
        results.append(json.loads(path.read_text())["results"]["sums"])
    assert results[0]["perplexity,none"] == pytest.approx(results[1]["perplexity,none"], rel=1e-6)


def watched(cluster: Cluster, end: float) -> Iterator[list[str]]:
    """The command lines of both hosts, again and again."""
    while True:
        assert time.monotonic() < end, "the run was not done in time"
        yield [line for host in cluster.hosts.values() for line in host.processes().values()]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_keys_reach_every_rank_and_no_command_line(
    cluster: Cluster, folder: Path, launcher: str
) -> None:
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    (folder / "env").write_text("FROM_FILE=so too\n")
    for path in (*folder.glob("seen_*"), *folder.glob("go")):
        path.unlink()
    env = {"WANDB_API_KEY": KEY, "COMET_API_KEY": KEY, "NCCL_X": "a b'c", "HF_TOKEN": KEY}
    env["DS_ENV_FILE"] = str(folder / "env")
    command = [PYTHON, DEEPY, script, "model.yml", "-H", "hosts", "--set", f"launcher={launcher}"]
    process = cluster["alpha"].start(command, cwd=folder, env=env)
    for lines in watched(cluster, time.monotonic() + PATIENCE_S):
        assert not [line for line in lines if KEY in line]
        if len(list(folder.glob("seen_*"))) == 4 or process.poll() is not None:
            break
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("neox-run-*")}
    (folder / "go").touch()
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, errors) == (0, "", "")
    for rank, (host, local) in enumerate([("alpha", 0), ("alpha", 1), ("beta", 0), ("beta", 1)]):
        seen = (folder / f"seen_{rank}").read_text()
        assert seen == f"{host} {folder} {KEY} {KEY} a b'c {KEY} {local} so too"
    assert list(modes.values()) == [0o700]


def test_srun_may_start_the_ranks_itself(
    cluster: Cluster, folder: Path, one_host: list[float]
) -> None:
    train = f"{PYTHON} {DEEPY} train.py model.yml --set"
    (folder / "batch.sh").write_text(
        "#!/bin/bash\n"
        f"srun {train} log_dir=inside --set deepspeed_slurm=true\n"
        f"{train} log_dir=around --set launcher=slurm\n"
    )
    submit = ["sbatch", "--wait", "-N2", "--ntasks-per-node=2", "--output=batch.txt", "batch.sh"]
    done = cluster["alpha"].run(
        submit, cwd=folder, env={"OMP_NUM_THREADS": "1"}, timeout=PATIENCE_S
    )
    printed = (folder / "batch.txt").read_text()
    assert done.returncode == 0, printed
    assert losses(folder / "inside") == pytest.approx(one_host, abs=1e-6), printed
    logs = sorted(path.name for path in (folder / "inside").glob("*.log"))
    assert logs == ["alpha_rank_1.log", "beta_rank_2.log", "beta_rank_3.log"]
    assert losses(folder / "around") == pytest.approx(one_host, abs=1e-6), printed
    assert sum("| iteration " in line for line in printed.splitlines()) == 2 * ITERATIONS


def test_mpirun_may_start_the_ranks_itself(
    cluster: Cluster, folder: Path, one_host: list[float]
) -> None:
    mpirun = ("mpirun.openmpi", "--allow-run-as-root", "--host", "alpha:2,beta:2", "-n", "4")
    mpirun += ("--bind-to", "none", "-x", "MASTER_ADDR=alpha", "-x", "OMP_NUM_THREADS")
    sets = ("--set", "log_dir=by_mpirun", "--set", "deepspeed_mpi=true")
    deepy(cluster["alpha"], folder, "train.py", "model.yml", *sets, prefix=mpirun)
    assert losses(folder / "by_mpirun") == pytest.approx(one_host, abs=1e-6)
