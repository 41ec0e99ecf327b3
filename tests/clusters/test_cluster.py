"""The cluster itself: what tests on it rely on."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.clusters.cluster import Cluster


def test_hosts_have_their_own_names_networks_processes_and_disks(cluster: Cluster) -> None:
    for name, other in (("alpha", "beta"), ("beta", "alpha")):
        host = cluster[name]
        assert host.run(["hostname"]).stdout == f"{name}\n"
        (reached,) = host.run(["ssh", other, "hostname"], check=True).stdout.split()
        assert reached == other
        host.run(["touch", f"/tmp/{name}"], check=True)
    assert cluster["beta"].run(["ls", "/tmp/alpha"]).returncode != 0
    (cluster.folder / "shared").write_text("seen")
    assert cluster["beta"].run(["cat", cluster.folder / "shared"]).stdout == "seen"


def test_slurm_runs_tasks_on_both_hosts(cluster: Cluster) -> None:
    done = cluster["beta"].run(["srun", "-N2", "-n4", "--ntasks-per-node=2", "hostname"])
    assert sorted(done.stdout.split()) == ["alpha", "alpha", "beta", "beta"], done


def test_the_network_is_cut_and_restored(cluster: Cluster) -> None:
    ssh = ["ssh", "-o", "ConnectTimeout=2", "beta", "true"]
    cluster.cut("beta")
    assert cluster["alpha"].run(ssh).returncode == 255
    cluster.restore("beta")
    cluster["alpha"].run(ssh, check=True)


def test_a_small_disk_is_soon_full(cluster: Cluster) -> None:
    disk = cluster.folder / "disk"
    cluster["beta"].mount_disk(disk, 1 << 20)
    write = ["dd", "if=/dev/zero", f"of={disk}/file", "bs=1M", "count=2"]
    assert "No space left" in cluster["beta"].run(write).stderr
    assert not list(disk.iterdir())
    cluster["beta"].unmount_disk(disk)


def test_a_command_gets_signals(cluster: Cluster) -> None:
    script = "trap 'echo got it; exit 3' USR1; echo ready; while :; do sleep 0.1; done"
    process = cluster["alpha"].start(["bash", "-c", script])
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    cluster["alpha"].signal(process, signal.SIGUSR1)
    assert process.stdout.read() == "got it\n"
    assert process.wait() == 3


def test_a_host_whose_processes_are_all_killed_can_start_again(cluster: Cluster) -> None:
    cluster["beta"].kill_all()
    assert cluster["alpha"].run(["ssh", "beta", "true"]).returncode == 255
    cluster.start_services()
    cluster["alpha"].run(["ssh", "beta", "true"], check=True)


def test_nothing_is_left_of_a_cluster() -> None:
    with Cluster(("one", "two")) as made:
        inits = [host.pid for host in made.hosts.values()]
        folder = made.folder
        sleep = made["one"].start(["sleep", "1000"])
    assert sleep.wait(10) != 0
    assert not folder.exists()
    assert not [pid for pid in inits if Path(f"/proc/{pid}").exists()]
