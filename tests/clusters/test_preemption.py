"""Training over two hosts that is asked to stop, by a signal or by Slurm: it saves, and is done."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clusters.cluster import Cluster, Host
from tests.clusters.model import DEEPY, PYTHON, write_folder
from tests.clusters.training import LAUNCHERS, LONG, PATIENCE_S, Training

SAVING = {"train_iters": LONG, "save": "save", "load": "save", "checkpoint_factor": LONG}
RECIPE = Path(__file__).parents[2] / "recipes" / "train.sbatch"
# Of the recipe's options, what these hosts, which have no GPU, cannot give.
TOO_MUCH = r"#SBATCH --(?:gpus-per-node|cpus-per-task|ntasks-per-node)=\d+\n"


def assert_saved(folder: Path, printed: str, who: str) -> None:
    last = re.findall(r"\| iteration +(\d+)/", printed)[-1]
    assert (folder / "save" / "latest").read_text() == f"global_step{last}"
    assert printed.endswith(f"stopped after iteration {last}, as {who} asked\n"), printed
    assert not list(folder.glob("neox-run-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_hosts_stop_after_the_same_step(
    cluster: Cluster, train: Callable[..., Training], launcher: str
) -> None:
    run = train(f"asked_{launcher}", launcher=launcher, **SAVING)
    run.wait_for(r"iteration +3/")
    cluster["alpha"].signal(run.process, signal.SIGUSR1)
    assert run.end(PATIENCE_S) == 0, run.stderr
    assert_saved(run.folder, run.stdout, "SIGUSR1")
    run.assert_nothing_left()


@pytest.mark.parametrize("name", ["TERM"])
def test_slurm_asks_the_ranks_of_its_job(
    cluster: Cluster, train: Callable[..., Training], name: str
) -> None:
    salloc = ("salloc", "--quiet", "-N2", "--ntasks-per-node=2")
    run = train(f"scancel_{name}", prefix=salloc, launcher="slurm", **SAVING)
    run.wait_for(r"iteration +3/")
    (job,) = jobs(cluster["alpha"])
    cluster["alpha"].run(["scancel", f"--signal={name}", job], check=True)
    assert run.end(PATIENCE_S) == 0, run.stderr
    assert_saved(run.folder, run.stdout, f"SIG{name}")
    run.assert_nothing_left()


@pytest.mark.parametrize("whom", ["--batch", "--full"])
def test_the_recipes_job_saves_when_its_time_is_nearly_over(cluster: Cluster, whom: str) -> None:
    """--batch is what `--signal=B:` does; --full asks the script, deepy.py and the ranks."""
    folder = cluster.folder / f"recipe{whom}"
    write_folder(folder, **SAVING)
    recipe = RECIPE.read_text()
    assert len(re.findall(TOO_MUCH, recipe)) == 3
    script = re.sub(TOO_MUCH, "", recipe).replace("./deepy.py", f"{PYTHON} {DEEPY}")
    (folder / "train.sbatch").write_text(script)
    options = ["--parsable", "--ntasks-per-node=2", "--output=printed"]
    submit = ["sbatch", *options, "train.sbatch", "model.yml"]
    host = cluster["alpha"]
    env = {"OMP_NUM_THREADS": "1"}
    job = host.run(submit, cwd=folder, env=env, check=True).stdout.strip()
    printed = folder / "printed"
    wait_until(lambda: printed.exists() and "| iteration        3/" in printed.read_text())
    host.run(["scancel", "--signal=USR1", whom, job], check=True)
    wait_until(lambda: job not in jobs(host))
    assert "ExitCode=0:0" in host.run(["scontrol", "show", "job", job], check=True).stdout
    assert_saved(folder, printed.read_text(), "SIGUSR1")


def jobs(host: Host) -> list[str]:
    return host.run(["squeue", "--noheader", "--format=%i"], check=True).stdout.split()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
