"""Several hosts on one machine, for tests: real networks, sshd and Slurm between namespaces.

A host has its own network, name, processes, /tmp, /run, /dev/shm and home; /etc/hosts and the
configuration of ssh and Slurm are the cluster's. It sees this machine's other files, as if over
NFS; `Cluster.folder` is where hosts and tests share theirs. A switch, which is a namespace with a
bridge, connects the hosts. Nothing outside the namespaces is changed but for that folder, and all
of it goes when the process that made it ends, however it does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clusters import services
from tests.clusters.packages import PATH, NoCluster, install_packages

_INIT = Path(__file__).with_name("host_init.py")
_UNSHARE = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]


class Namespaces:
    """Namespaces of their own, held by a process that is their process 1."""

    def __init__(self, *arguments: str) -> None:
        command = [*_UNSHARE, "--kill-child", sys.executable, "-I", str(_INIT), *arguments]
        self.outer = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.outer.stdout is not None and self.outer.stderr is not None
        if self.outer.stdout.readline() != b"up\n":
            raise NoCluster(f"no namespaces here: {self.outer.stderr.read().decode().strip()}")
        self.pid = child_of(self.outer)  # of process 1, as this machine numbers it

    def enter(self, command: Sequence[str | Path], cwd: Path | str = "/") -> list[str]:
        """The words that run `command` inside."""
        # nsenter's own --wd would be a folder of the mounts outside, and renaming fail across them.
        start = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
        return ["nsenter", f"--target={self.pid}", "--all", *start, *map(str, command)]

    def close(self) -> None:
        assert self.outer.stdin is not None
        self.outer.stdin.close()
        self.outer.wait(timeout=30)


class Host(Namespaces):
    """One machine of the cluster."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        super().__init__()
        self.name = name
        self.address = address
        self.folder = folder  # what is this host's alone
        self.environment = {"PATH": PATH, "HOME": str(folder / "home"), "LANG": "C.UTF-8"}

    def start(
        self,
        command: Sequence[str | Path],
        cwd: Path | str = "/",
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start `command`, in a session of its own, with `env` added to a login's environment.

        The Popen is of nsenter, which ends as the command does; signals go by `signal`.
        """
        return subprocess.Popen(
            self.enter(command, cwd),
            env={**self.environment, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        command: Sequence[str | Path],
        cwd: Path | str = "/",
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end; after `timeout` seconds kill its session and raise.

        Output is read from files: a daemon that the command leaves behind may keep them open.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(command, cwd, env, stdout=out.fileno(), stderr=err.fileno())
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                out.seek(0), err.seek(0)
                raise AssertionError(
                    f"{shlex.join(map(str, command))} on {self.name} was not done after "
                    f"{timeout:g} s:\n{out.read()}{err.read()}"
                ) from None
            out.seek(0), err.seek(0)
            done = subprocess.CompletedProcess(process.args, status, out.read(), err.read())
        if check:
            assert status == 0, f"{shlex.join(map(str, command))} on {self.name}: {done}"
        return done

    def signal(self, process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to the command that `start` started."""
        os.kill(child_of(process), number)

    def processes(self) -> dict[int, str]:
        """The command lines of all processes here, by the host's own numbers."""
        script = 'for p in /proc/[0-9]*; do echo "${p#/proc/} $(tr "\\0" " " <$p/cmdline)"; done'
        lines = self.run(["sh", "-c", f"{script} 2>/dev/null"]).stdout.splitlines()
        return {int(pid): text for pid, _, text in (line.partition(" ") for line in lines)}

    def kill_all(self) -> None:
        """Kill every process of this host but its first; services too, see `start_services`."""
        self.run(["sh", "-c", "kill -KILL -1"])

    def mount_disk(self, path: Path, size: int) -> None:
        """Put a disk of `size` bytes at the folder `path`, which only this host sees."""
        path.mkdir(parents=True, exist_ok=True)
        disk = ["mount", "-t", "tmpfs", "-o", f"size={size}", "disk", path]
        self.run(disk, check=True)

    def unmount_disk(self, path: Path) -> None:
        self.run(["umount", "--lazy", path], check=True)


class Cluster:
    """Hosts by name, `folder`, which they share, and what happens to the network between them.

    Raises NoCluster where this machine cannot have one.
    """

    def __init__(self, names: Sequence[str] = ("alpha", "beta"), cpus: int = 8) -> None:
        install_packages()
        self.cpus = cpus  # that Slurm believes each host to have
        # Not under /tmp, of which each host has its own.
        self.folder = Path(tempfile.mkdtemp(prefix="neox-cluster-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self._parts: list[Namespaces] = []
        self.hosts: dict[str, Host] = {}
        try:
            self._switch = Namespaces(str(self.folder))
            self._parts.append(self._switch)
            self._do(self._switch, "ip link add switch type bridge && ip link set switch up")
            for number, name in enumerate(names, start=1):
                host = Host(name, f"10.77.0.{number}", self.folder / name)
                self._parts.append(host)
                self.hosts[name] = host
                self._connect(host, number)
            services.configure(self.folder, self.hosts.values(), cpus)
            self.start_services()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every host and remove the folder."""
        for part in reversed(self._parts):  # the switch, which removes the folder, last
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.close()

    def start_services(self) -> None:
        """Start what does not run of sshd, munged, slurmd, slurmctld; wait until Slurm is idle."""
        services.start(self.hosts.values())

    def cut(self, name: str) -> None:
        """Drop every packet from and to a host, without a word to either side."""
        self._do(self._switch, f"bridge link set dev {name} state 0")

    def restore(self, name: str) -> None:
        self._do(self._switch, f"bridge link set dev {name} state 3")

    def _connect(self, host: Host, number: int) -> None:
        port = f"ip link add {host.name} type veth peer name eth0 netns {host.pid}"
        self._do(self._switch, f"{port} && ip link set {host.name} master switch up")
        self._do(
            host,
            f"hostname {host.name} && ip link set lo up && ip address add {host.address}/24 "
            "dev eth0 && ip link set eth0 up",
        )
        state, deadline = "", time.monotonic() + 10
        while "forwarding" not in state:  # the bridge looks at a new port for a moment
            if time.monotonic() > deadline:
                raise NoCluster(f"the port of {host.name} does not come up: {state}")
            state = self._do(self._switch, f"bridge link show dev {host.name}")

    def _do(self, where: Namespaces, script: str) -> str:
        # Not in its namespace of processes: the numbers of ours say whose the other end is to be.
        enter = ["nsenter", f"--target={where.pid}", "--net", "--uts"]
        done = subprocess.run(
            [*enter, "sh", "-ec", script],
            env={"PATH": PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NoCluster(f"the platform refused `{script}`: {done.stderr.strip()}")
        return done.stdout


def child_of(process: subprocess.Popen) -> int:
    """The process that unshare or nsenter has forked, once it has."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if numbers := children.read_text().split():
            return int(numbers[0])
    raise ProcessLookupError(f"{process.args} has ended with status {process.returncode}")
