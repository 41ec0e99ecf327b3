"""sshd, munged and Slurm on the hosts of a test's cluster: their files and their start."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.clusters.packages import NoCluster

if TYPE_CHECKING:
    from tests.clusters.cluster import Host

PATIENCE_S = 60.0
_ROOT = Path(__file__).parents[2]

_SSHD = """\
HostKey {shared}/host_key
AuthorizedKeysFile {shared}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile /run/sshd.pid
MaxStartups 100
"""
_SSH = """\
IdentityFile {shared}/user_key
GlobalKnownHostsFile {shared}/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
"""
# Neither cgroups nor an account of Slurm's own: a machine of a CI service may have neither.
_SLURM = """\
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldParameters=node_reg_mem_percent=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/tmp/slurmctld.log
SlurmdLogFile=/tmp/slurmd.log
KillWait=10
MessageTimeout=30
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def configure(shared: Path, hosts: Iterable[Host], cpus: int) -> None:
    """Write what the hosts share, then put each host's files and disks where programs look."""
    hosts = list(hosts)
    (shared / "munge.key").write_bytes(os.urandom(1024))
    (shared / "munge.key").chmod(0o400)
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(shared / key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    public = (shared / "host_key.pub").read_text()
    aliases = ",".join(name for host in hosts for name in (host.name, host.address))
    (shared / "known_hosts").write_text(f"localhost,127.0.0.1,{aliases} {public}")
    (shared / "sshd_config").write_text(_SSHD.format(shared=shared))
    (shared / "ssh_config").write_text(_SSH.format(shared=shared))
    (shared / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    )
    slurm = shared / "slurm"
    slurm.mkdir()
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus}" for host in hosts]
    names = ",".join(host.name for host in hosts)
    text = _SLURM.format(first=hosts[0].name, nodes="\n".join(nodes), names=names)
    (slurm / "slurm.conf").write_text(text)
    for host in hosts:
        _furnish(host, shared)


def _furnish(host: Host, shared: Path) -> None:
    home = host.folder / "home"
    home.mkdir(parents=True)
    accounts = Path("/etc/passwd").read_text().splitlines()
    mine = [_at_home(line, home) if line.startswith("root:") else line for line in accounts]
    (host.folder / "passwd").write_text("\n".join(mine) + "\n")
    binds = {
        shared / "hosts": "/etc/hosts",
        shared / "ssh_config": "/etc/ssh/ssh_config",
        shared / "slurm": "/etc/slurm",
        host.folder / "passwd": "/etc/passwd",
    }
    # A checkout under /tmp is still to be seen, at the same place.
    checkout, aside = shlex.quote(str(_ROOT)), shlex.quote(str(host.folder / "checkout"))
    script = [
        f"mkdir {aside} && mount --bind {checkout} {aside}",
        *(f"mount -t tmpfs -o mode=1777 own {path}" for path in ("/tmp", "/dev/shm")),
        f"mkdir -p {checkout} && mount --move {aside} {checkout}",
        "mount -t tmpfs -o mode=755 own /run",
        *(f"mount --bind {source} {target}" for source, target in binds.items()),
        "mkdir -m 755 -p /run/sshd /run/munge /run/slurmd /run/slurmctld",
    ]
    done = host.run(["sh", "-ec", "\n".join(script)])
    if done.returncode:
        raise NoCluster(f"the platform refused a host's disks: {done.stderr.strip()}")


def _at_home(account: str, home: Path) -> str:
    fields = account.split(":")
    return ":".join([*fields[:5], str(home), *fields[6:]])


def start(hosts: Iterable[Host]) -> None:
    """Start the services that do not run, and wait until every node is idle."""
    hosts = list(hosts)
    shared = hosts[0].folder.parent
    daemons = {
        "sshd": ["/usr/sbin/sshd", "-f", f"{shared}/sshd_config"],
        # --force: as root, with a key outside of /etc
        "munged": ["/usr/sbin/munged", "--force", f"--key-file={shared}/munge.key"],
        "slurmd": ["/usr/sbin/slurmd"],
        "slurmctld": ["/usr/sbin/slurmctld"],
    }
    daemons["munged"] += ["--log-file=/tmp/munged.log", "--seed-file=/run/munge/seed"]
    for host in hosts:
        running = " ".join(host.processes().values())
        for name, command in daemons.items():
            if command[0] in running or (name == "slurmctld" and host is not hosts[0]):
                continue
            done = host.run(command)
            if done.returncode:
                raise NoCluster(f"{name} does not start on {host.name}: {done.stderr.strip()}")
    deadline = time.monotonic() + PATIENCE_S
    states: list[str] = []
    while states != ["idle"] * len(hosts):
        if time.monotonic() > deadline:
            logs = hosts[0].run(["tail", "-n", "5", "/tmp/slurmctld.log", "/tmp/slurmd.log"])
            raise NoCluster(f"Slurm's nodes are {states}, not idle; {logs.stdout}")
        states = hosts[0].run(["sinfo", "--noheader", "--Node", "--format=%t"]).stdout.split()
        time.sleep(0.1)
