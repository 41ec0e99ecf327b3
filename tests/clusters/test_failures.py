"""Training over two hosts that lose each other, processes, or room on a disk, by each launcher."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.clusters.cluster import Cluster
from tests.clusters.model import losses
from tests.clusters.training import LONG, PATIENCE_S, Training

Train = Callable[..., Training]
# Each launcher's own process on a host that is not deepy.py's.
PARTS = {"pdsh": r"\S*python\S* -m deepspeed", "openmpi": r"\S*orted "}
PROGRAMS = {"pdsh": r"\S*pdsh ", "slurm": r"\S*srun ", "openmpi": r"\S*mpirun", "mpich": r"\S*mpi"}


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich"])
def test_a_cut_network_ends_the_run_on_both_sides(
    cluster: Cluster, train: Train, launcher: str
) -> None:
    run = train(f"cut_{launcher}", launcher=launcher, train_iters=LONG)
    run.wait_for(r"iteration +3/")
    cluster.cut("beta")
    assert run.end() == 1, run.stderr
    assert re.match(r"error: beta stopped answering \d+ s ago, with ranks 2, 3\n", run.stderr)
    assert re.search(r"  rank 2 on beta \(pid \d+\) was ", run.stderr)
    run.assert_nothing_left()  # beta's end by themselves


@pytest.mark.parametrize("launcher", ["pdsh", "slurm"])
def test_a_host_whose_processes_are_killed_is_named(
    cluster: Cluster, train: Train, launcher: str
) -> None:
    run = train(f"killed_{launcher}", launcher=launcher, train_iters=LONG)
    run.wait_for(r"iteration +3/")
    cluster["beta"].kill_all()
    assert run.end() == 137, run.stderr
    assert re.match(r"error: rank [23] on beta \(pid \d+\) was killed", run.stderr), run.stderr
    cluster.start_services()
    run.assert_nothing_left()


@pytest.mark.parametrize("launcher", ["slurm", "openmpi"])
def test_a_stopped_rank_is_named(cluster: Cluster, train: Train, launcher: str) -> None:
    run = train(f"stopped_{launcher}", launcher=launcher, train_iters=LONG)
    run.wait_for(r"iteration +3/")
    pid = run.signal("beta", "rank-3", "STOP")
    assert run.end() == 1, run.stderr
    assert re.match(rf"error: rank 3 on beta \(pid {pid}\) is stopped since \d+ s\n", run.stderr)
    assert re.search(r"  ranks? [\d, ]+ waits? in ", run.stderr)
    run.assert_nothing_left()


def test_a_stopped_keeper_is_no_lost_host(cluster: Cluster, train: Train) -> None:
    run = train("keeper", train_iters=LONG)
    run.wait_for(r"iteration +3/")
    run.signal("beta", "keeper-3", "STOP")
    assert run.end() == 1, run.stderr
    named = r"error: the keeper of rank 3 on beta \(pid \d+\) stopped answering \d+ s ago\n"
    assert re.match(named, run.stderr), run.stderr
    run.assert_nothing_left()


@pytest.mark.parametrize("launcher", ["openmpi"])
def test_a_full_disk_is_named_with_its_host(cluster: Cluster, train: Train, launcher: str) -> None:
    save = cluster.folder / f"beta_disk_{launcher}"
    save.mkdir()
    cluster["beta"].mount_disk(save, 1 << 16)
    aside = save / ".unfinished" / "global_step3"  # rank 0 makes it, where beta does not see it
    cluster["beta"].run(["mkdir", "-p", aside], check=True)
    values = {"save": str(save), "checkpoint_factor": 3, "train_iters": LONG}
    run = train(f"full_{launcher}", launcher=launcher, **values)
    assert run.end(PATIENCE_S) == 2, run.stderr
    assert re.match(r"error: save: the checkpoint of iteration 3 could not be written", run.stderr)
    assert re.search(r"No space left on device \(on rank [23, ]+on beta\)", run.stderr), run.stderr
    assert run.stderr.count("\n") == 1
    run.assert_nothing_left()
    cluster["beta"].unmount_disk(save)


@pytest.mark.parametrize("launcher", ["slurm", "openmpi", "mpich"])
def test_a_killed_launcher_is_named_and_leaves_nothing(
    cluster: Cluster, train: Train, launcher: str
) -> None:
    run = train(f"launcher_{launcher}", launcher=launcher, train_iters=LONG)
    run.wait_for(r"iteration +3/")
    run.signal_command("alpha", PROGRAMS[launcher], "KILL")
    assert run.end() == 137, run.stderr
    assert run.stderr.startswith("error: the launcher was killed by signal 9 (SIGKILL)")
    run.assert_nothing_left()
    deadline = time.monotonic() + PATIENCE_S
    while jobs := cluster["alpha"].run(["squeue", "--noheader"]).stdout:
        assert time.monotonic() < deadline, jobs


def test_a_launcher_that_loses_its_part_on_a_host_is_not_taken_for_a_dead_rank(
    cluster: Cluster, train: Train
) -> None:
    """Open MPI's then ends the ranks on all other hosts."""
    run = train("part_openmpi", launcher="openmpi", train_iters=LONG)
    run.wait_for(r"iteration +3/")
    run.signal_command("beta", PARTS["openmpi"], "KILL")
    assert run.end() == 1, run.stderr
    named = "error: the launcher's own process on beta, which had started ranks 2, 3, was killed"
    assert run.stderr.startswith(named), run.stderr
    run.assert_nothing_left()


@pytest.mark.parametrize("launcher", ["pdsh"])
def test_a_run_goes_on_without_the_launchers_part_on_a_host(
    cluster: Cluster, train: Train, launcher: str
) -> None:
    values = {"train_iters": LONG, "save": "save", "checkpoint_factor": LONG}
    run = train(f"part_{launcher}", launcher=launcher, **values)
    run.wait_for(r"iteration +3/")
    run.signal_command("beta", PARTS[launcher], "KILL")
    last = int(re.findall(r"iteration +(\d+)/", run.stdout)[-1])
    run.wait_for(rf"iteration +{last + 20}/")
    cluster["alpha"].signal(run.process, signal.SIGTERM)
    assert run.end() == 0, run.stderr
    run.assert_nothing_left()


def test_a_network_that_is_cut_for_a_moment_does_no_harm(cluster: Cluster, train: Train) -> None:
    values = {"train_iters": LONG, "save": "save", "checkpoint_factor": LONG}
    run = train("moment", **values)
    run.wait_for(r"iteration +3/")
    cluster.cut("beta")
    run.wait_until_still()
    cluster.restore("beta")
    last = int(re.findall(r"iteration +(\d+)/", run.stdout)[-1])
    run.wait_for(rf"iteration +{last + 20}/")
    cluster["alpha"].signal(run.process, signal.SIGTERM)
    assert run.end() == 0, run.stderr
    run.assert_nothing_left()


def test_a_host_that_is_lost_before_its_ranks_start_is_named(
    cluster: Cluster, train: Train
) -> None:
    """Its login says so, before anything of the run is there, and sleeps."""
    profile = cluster["beta"].folder / "home" / ".ssh" / "rc"
    profile.parent.mkdir(exist_ok=True)
    profile.write_text(f"touch {cluster.folder}/logged_in; sleep 1000\n")
    try:
        run = train("early", "--set", "no_ssh_check=true", train_iters=LONG)
        run.wait_until(lambda: (cluster.folder / "logged_in").exists())
        run.wait_until(lambda: bool(run.ranks(cluster["alpha"])))
        cluster.cut("beta")
        assert run.end() == 1, run.stderr
    finally:
        profile.unlink()
    named = r"error: beta stopped answering \d+ s ago, before ranks 2, 3 started\n"
    assert re.match(named, run.stderr), run.stderr
    run.assert_nothing_left("alpha")
    cluster.restore("beta")


def test_a_host_that_takes_no_ssh_is_named(cluster: Cluster, train: Train) -> None:
    cluster["beta"].run(["pkill", "-x", "sshd"], check=True)
    run = train("refused", "--set", "no_ssh_check=true", train_iters=LONG)
    status = run.end(PATIENCE_S)
    cluster.start_services()
    assert status == 1, run.stderr
    named = "error: ssh to beta ended with status 255, before ranks 2, 3 had started there\n"
    assert named in run.stderr and "Connection refused" in run.stderr
    run.assert_nothing_left()


# What does not need a restart is above; each costs two starts.
RESTARTS = [("cut", "slurm"), ("kill", "openmpi"), ("stop", "mpich")]


@pytest.mark.parametrize(("fault", "launcher"), RESTARTS)
def test_a_restarted_run_has_the_losses_of_an_undisturbed_one(
    cluster: Cluster, train: Train, undisturbed: list[float], fault: str, launcher: str
) -> None:
    name = f"restarted_{fault}_{launcher}"
    run = train(name, "--restarts", "1", launcher=launcher, **SAVING)
    run.wait_for(r"checkpoint of iteration 8 saved")
    if fault == "cut":
        cluster.cut("beta")
        run.wait_for("waiting up to .* for beta to answer again")
        cluster.restore("beta")
    else:
        run.signal("beta", "rank-2", fault.upper())
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
