"""Training over two hosts that lose each other, processes, or room on a disk."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.clusters.cluster import Cluster
from tests.clusters.model import losses
from tests.clusters.training import ENDED_S, LONG, PATIENCE_S, Training

@pytest.fixture
def train(cluster: Cluster) -> Iterator[Callable[..., Training]]:
    runs = []

    def begin(name: str, *arguments: str, **values: Any) -> Training:
        runs.append(Training(cluster, name, *arguments, **values))
        return runs[-1]

    yield begin
    for run in runs:
        cluster.restore("beta")
        if run.process.poll() is None:
            cluster["alpha"].signal(run.process, signal.SIGINT)
            try:
                run.process.wait(30)
            except subprocess.TimeoutExpired:
                cluster["alpha"].signal(run.process, signal.SIGKILL)


def test_a_cut_network_ends_the_run_on_both_sides(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    run = train("cut", train_iters=LONG)
    run.wait_for(r"iteration +3/")
    cluster.cut("beta")
    assert run.end() == 1, run.stderr
    assert re.match(r"error: beta stopped answering \d+ s ago, with ranks 2, 3\n", run.stderr)
    assert re.search(r"  rank 2 on beta \(pid \d+\) was ", run.stderr)
    assert "Traceback" not in run.stderr
    run.assert_nothing_left()  # beta's end by themselves


def test_a_host_whose_processes_are_killed_is_named(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    run = train("killed", train_iters=LONG)
    run.wait_for(r"iteration +3/")
    cluster["beta"].kill_all()
    assert run.end() == 137, run.stderr
    assert re.search(r"error: rank [23] on beta \(pid \d+\) was killed", run.stderr)
    assert "Traceback" not in run.stderr
    cluster.start_services()
    run.assert_nothing_left()


def test_a_stopped_rank_is_named(cluster: Cluster, train: Callable[..., Training]) -> None:
    run = train("stopped", train_iters=LONG)
    run.wait_for(r"iteration +3/")
    pid = run.ranks(cluster["beta"])["neox-rank-3"]
    cluster["beta"].run(["kill", "-STOP", str(pid)], check=True)
    assert run.end() == 1, run.stderr
    assert re.match(rf"error: rank 3 on beta \(pid {pid}\) is stopped since \d+ s\n", run.stderr)
    assert re.search(r"  ranks? [\d, ]+ waits? in ", run.stderr)
    assert "Traceback" not in run.stderr
    run.assert_nothing_left()


def test_a_full_disk_is_named_with_its_host(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    save = cluster.folder / "beta_disk"
    save.mkdir()
    cluster["beta"].mount_disk(save, 1 << 16)
    aside = save / ".unfinished" / "global_step3"  # rank 0 makes it, where beta does not see it
    cluster["beta"].run(["mkdir", "-p", aside], check=True)
    run = train("full", train_iters=LONG, save=str(save), checkpoint_factor=3)
    assert run.end(PATIENCE_S) == 2, run.stderr
    assert re.match(r"error: save: the checkpoint of iteration 3 could not be written", run.stderr)
    assert re.search(r"No space left on device \(on rank [23, ]+on beta\)", run.stderr), run.stderr
    assert run.stderr.count("\n") == 1
    run.assert_nothing_left()
    cluster["beta"].unmount_disk(save)


@pytest.mark.parametrize("fault", ["cut", "kill", "stop"])
def test_a_restarted_run_has_the_losses_of_an_undisturbed_one(
    cluster: Cluster, train: Callable[..., Training], undisturbed: list[float], fault: str
) -> None:
    run = train(f"restarted_{fault}", "--restarts", "1", **SAVING)
    run.wait_for(r"checkpoint of iteration 8 saved")
    if fault == "cut":
        cluster.cut("beta")
        run.wait_for("waiting up to .* for beta to answer again")
        cluster.restore("beta")
    else:
        number = "-STOP" if fault == "stop" else "-KILL"
        pid = run.ranks(cluster["beta"])["neox-rank-2"]
        cluster["beta"].run(["kill", number, str(pid)], check=True)
    assert run.end(PATIENCE_S) == 0, run.stderr
    assert re.search(r"restart 1 of 1, from global_step\d+: (rank 2 on )?beta", run.stdout)
    assert losses(run.folder / "logs") == undisturbed
    run.assert_nothing_left()


SAVING = {
    "train_iters": 40,
    "lr_decay_iters": 40,
    "checkpoint_factor": 4,
    "save": "save",
    "load": "save",
    "hidden_dropout": 0.1,
}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[float]:
    run = Training(cluster, "undisturbed", **SAVING)
    assert run.end(PATIENCE_S) == 0, run.stderr
    return losses(run.folder / "logs")


def test_all_hosts_stop_after_the_same_step(
    cluster: Cluster, train: Callable[..., Training]
) -> None:
    run = train("asked", train_iters=LONG, save="save", checkpoint_factor=LONG)
    run.wait_for(r"iteration +3/")
    cluster["alpha"].signal(run.process, signal.SIGUSR1)
    assert run.end(PATIENCE_S) == 0, run.stderr
    last = re.findall(r"\| iteration +(\d+)/", run.stdout)[-1]
    assert (run.folder / "save" / "latest").read_text() == f"global_step{last}"
    assert run.stdout.endswith(f"stopped after iteration {last}, as SIGUSR1 asked\n")
    run.assert_nothing_left()
