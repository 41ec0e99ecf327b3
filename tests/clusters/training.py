"""train.py over the two hosts of a test's cluster, to be disturbed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from tests.clusters.cluster import Cluster, Host
from tests.clusters.model import DEEPY, PYTHON, write_folder

PATIENCE_S = 240.0  # on two cores that do much else
ENDED_S = 60.0  # within which a failure ends the run everywhere
LONG = 1_000_000
LAUNCHERS = ("pdsh", "slurm", "openmpi", "mpich")
STILL_S = 2.0  # without a step, of which some take 0.1 s


class Training:
    """train.py over alpha, where it is started, and beta, with two ranks on each.

    `prefix` is the command in front of deepy.py; with "salloc" there is no hostfile.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *arguments: str,
        prefix: Sequence[str] = (),
        **values: object,
    ) -> None:
        self.cluster = cluster
        self.folder = cluster.folder / name
        write_folder(self.folder, **{"log_dir": "logs", **values})
        where = [] if "salloc" in prefix else ["-H", "hosts"]
        self._begin([*prefix, str(PYTHON), str(DEEPY), "train.py", "model.yml", *where, *arguments])

    def _begin(self, command: Sequence[str]) -> None:
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            self.process = self.cluster["alpha"].start(
                command,
                cwd=self.folder,
                env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=out.fileno(),
                stderr=err.fileno(),
            )

    def wait_for(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.stdout) is not None)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.stdout + self.stderr
            assert time.monotonic() < deadline, self.stdout
            time.sleep(0.05)

    def wait_until_still(self) -> None:
        """Until it has printed nothing for STILL_S."""
        printed, since = self.stdout, time.monotonic()
        while time.monotonic() < since + STILL_S:
            if self.stdout != printed:
                printed, since = self.stdout, time.monotonic()
            time.sleep(0.05)

    def end(self, seconds: float = ENDED_S) -> int:
        """The exit status; no process, and nobody's library, has told more than it should."""
        status = self.process.wait(seconds)
        assert "Traceback" not in self.stdout + self.stderr
        assert "====" not in self.stdout
        return status

    def signal(self, host: str, who: str, name: str) -> int:
        """Send "rank-3" or "keeper-3" a signal ("STOP"); its number, as the host counts."""
        pid = self.ranks(self.cluster[host])[f"neox-{who}"]
        self.cluster[host].run(["kill", f"-{name}", str(pid)], check=True)
        return pid

    def signal_command(self, host: str, pattern: str, name: str) -> None:
        """Send a signal to the first process whose command line begins so."""
        found = self.cluster[host].processes().items()
        pid = min(pid for pid, line in found if re.match(pattern, line))
        self.cluster[host].run(["kill", f"-{name}", str(pid)], check=True)

    def ranks(self, host: Host) -> dict[str, int]:
        """The ranks and keepers on a host, by name, as it numbers processes."""
        script = 'for p in /proc/[0-9]*; do echo "${p#/proc/} $(cat $p/comm)"; done 2>/dev/null'
        lines = host.run(["sh", "-c", script]).stdout.splitlines()
        found = {name: int(pid) for pid, _, name in (line.partition(" ") for line in lines)}
        return {name: pid for name, pid in found.items() if name.startswith("neox-")}

    def assert_nothing_left(self, *hosts: str) -> None:
        """Of the run's processes; the kernel may have the last steps of some yet to do."""
        for name in hosts or ("alpha", "beta"):
            deadline = time.monotonic() + 30
            while left := self.left(self.cluster[name]):
                assert time.monotonic() < deadline, left
        assert not list(self.folder.glob("neox-run-*"))

    def left(self, host: Host) -> list[str]:
        return [line for line in host.processes().values() if "neox-run-" in line]

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()
