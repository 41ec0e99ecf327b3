"""What the launcher and the ranks tell each other: files in one private folder per run.

    config.json        the configuration, encoded; ranks never read YAML
    job.json           what to run
    control.json       where deepy.py listens to the ranks' keepers, and a key (mode 600)
    start              over several hosts: what every process begins with, its variables too
    launcher.log       and what the launcher says, told if nothing else explains a failure
    claimed            there while rank 0 is at a terminal and acts on Ctrl-C itself
    rank_N.log         what rank N > 0 printed; kept as log_dir/HOST_rank_N.log when that is set

Each file is whole or absent. Nothing of a configuration appears on a command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from neox.atomic import write_text
from neox.cluster.place import Place
from neox.config import NeoXConfig
from neox.errors import ConfigError

# Over several hosts: the script that every process begins with, and what the launcher itself says.
START, NOISE = "start", "launcher.log"
# Every process of a run has it in its environment, which is how a stray one is found.
RUN_FOLDER = "NEOX_RUN_FOLDER"
CONFIG_FILE = "NEOX_CONFIG_FILE"
_CLAIMED = "claimed"


@dataclasses.dataclass(frozen=True)
class Job:
    """What every rank runs: an entry point of ours, or the user's own script."""

    entry_point: str | None
    script: str | None
    device: str | None  # "cpu", "cuda"; None: each rank looks for itself (several hosts)
    world_size: int
    master_addr: str
    master_port: int
    host: str  # where the launcher is
    log_dir: str | None = None
    hosts: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # slots in rank order

    def slots(self, rank: int) -> list[int]:
        """The slots of the run on the host of `rank`; [] where that is not known."""
        return next((slots for _, slots, ranks in self._ranks() if rank in ranks), [])

    def place(self, rank: int) -> Place:
        """Where a rank is: ranks are given out host by host, in order of their slots."""
        for _, slots, ranks in self._ranks():
            if rank in ranks:
                return Place(rank, rank - ranks.start, len(slots))
        raise AssertionError(f"rank {rank} has no place in {self.hosts}")

    def host_of(self, rank: int) -> str:
        return next(host for host, _, ranks in self._ranks() if rank in ranks)

    def _ranks(self) -> Iterator[tuple[str, list[int], range]]:
        first = 0
        for host, slots in self.hosts.items():
            yield host, slots, range(first, first + len(slots))
            first += len(slots)


@dataclasses.dataclass(frozen=True)
class End:
    """How a rank ended, in its own words."""

    status: int
    error: bool = False  # a NeoXError: `message` is for the user, else it is a traceback
    message: str = ""


class RunFolder:
    """One run's folder, from either side."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, job: Job, config: NeoXConfig, parent: Path | None = None) -> RunFolder:
        """A new folder that only this user can read (mkdtemp's mode is 0700)."""
        where = parent or Path(tempfile.gettempdir())
        path = None
        try:
            path = Path(tempfile.mkdtemp(prefix="neox-run-", dir=where))
            folder = cls(path)
            write_text(folder.path / "job.json", json.dumps(dataclasses.asdict(job)))
            write_text(folder.config_file, config.encode())
        except OSError as error:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise ConfigError(
                f"the run's own folder, {where}/neox-run-*, cannot be written: {error.strerror}"
            ) from error
        folder.job = job  # it stays known when the folder is gone
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    def log(self, rank: int, host: str) -> Path:
        """Of a rank on `host`."""
        if self.job.log_dir is None:
            return self.path / f"rank_{rank}.log"
        return log_of(self.job.log_dir, rank, host)

    @cached_property
    def job(self) -> Job:
        return Job(**json.loads((self.path / "job.json").read_text()))

    @property
    def started_over_hosts(self) -> bool:
        """Whether pdsh, srun or an mpirun starts the ranks."""
        return (self.path / START).exists()

    def launchers_words(self) -> list[str]:
        """What that launcher said, and what processes said that came to no rank."""
        noise = self.path / NOISE
        return noise.read_text(errors="replace").splitlines() if noise.exists() else []

    def config(self) -> NeoXConfig:
        return NeoXConfig.decode(self.config_file.read_text())

    @property
    def is_here(self) -> bool:
        """Whether this is the host that deepy.py runs on."""
        return self.job.host == socket.gethostname()

    @property
    def interrupts_are_claimed(self) -> bool:
        """Whether Ctrl-C is for rank 0, and not for the launcher."""
        return (self.path / _CLAIMED).exists()


def claim_interrupts(claimed: bool) -> None:
    """Say on rank 0 whether it acts on Ctrl-C itself, or the launcher ends the run, as at first.

    In a single process there is no launcher that would have to know.
    """
    if RUN_FOLDER in os.environ:
        file = Path(os.environ[RUN_FOLDER]) / _CLAIMED
        file.touch() if claimed else file.unlink(missing_ok=True)


def log_of(log_dir: str, rank: int, host: str) -> Path:
    return Path(log_dir) / f"{host}_rank_{rank}.log"


def open_log(log: Path) -> int:
    """An empty log to write to, as a file descriptor. Raises ConfigError."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise ConfigError(f"log_dir: {log} cannot be written: {error.strerror}.") from error
