"""Where a process is among those of its run, as the variables of whatever started it tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox.cluster.nodelist import counts, expand
from neox.config import NeoXConfig
from neox.errors import ConfigError

FIRST_PORT, LAST_PORT = 20000, 32767  # below those that Linux gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """A process's rank, its rank on this host, and how many processes there are on this host."""

    rank: int = 0
    local_rank: int = 0
    local_size: int = 1


@dataclass(frozen=True)
class _Variables:
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: str = ""  # a number that all processes of a run have, and no other run on these hosts


# An mpirun in a job of Slurm's is started by srun, and DeepSpeed's launcher by any of them: so the
# innermost first.
_VARIABLES = (
    _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # DeepSpeed, torchrun
    _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_MCA_ess_base_jobid",
    ),
    _Variables(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
_SLURM = _Variables(
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
)
# What a process that we start must not inherit: it would take its parent's place for its own.
INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def find_rank(environ: Mapping[str, str]) -> int | None:
    """The rank of a process that one of our launchers started; None without any variable."""
    names = [variables.rank for variables in (*_VARIABLES, _SLURM)]
    return next((int(environ[name]) for name in names if name in environ), None)


@dataclass(frozen=True)
class Started:
    """A run whose processes its user started, by srun or mpirun, seen from one of them."""

    place: Place
    sizes: tuple[int, ...]  # processes of each host
    master_addr: str | None  # where rank 0 is, if anything tells
    master_port: int | None

    @property
    def world_size(self) -> int:
        return sum(self.sizes)

    def meeting_point(self, config: NeoXConfig) -> tuple[str, int]:
        """Address and port of rank 0; what the configuration says goes first."""
        address = config.master_addr or self.master_addr
        if address is None:
            raise ConfigError(
                f"rank {self.place.rank} of {self.world_size} does not know the host of rank 0, "
                "which mpirun does not tell: set master_addr to its name, or export MASTER_ADDR"
            )
        given = config.origin("master_port") != "default"
        return address, config.master_port if given else self.master_port or config.master_port


def find_started(environ: Mapping[str, str]) -> Started | None:
    """What started several processes of deepy.py, of which this is one; None if nothing did."""
    for names in _VARIABLES:
        values = [environ.get(n) for n in (names.rank, names.size, names.local_rank)]
        if None in values or int(environ[names.size]) < 2:
            continue
        rank, size, local_rank = (int(value) for value in values if value is not None)
        local_size = int(environ.get(names.local_size, 1))
        whole, rest = divmod(size, local_size)
        sizes = (size,) if rest else (local_size,) * whole
        job = environ.get(names.job) or environ.get("SLURM_JOB_ID")
        place = Place(rank, local_rank, local_size)
        return Started(place, sizes, _master(environ, len(sizes)), _port(environ, job))
    if int(environ.get(_SLURM.size, 1)) < 2 or "SLURM_STEP_ID" not in environ:
        return None  # a batch script has SLURM_PROCID, too, and is one process
    sizes = tuple(counts(environ[_SLURM.local_size]))
    local_size = sizes[int(environ["SLURM_NODEID"])]
    place = Place(int(environ[_SLURM.rank]), int(environ[_SLURM.local_rank]), local_size)
    # Two steps of a job may share its hosts.
    job = str(int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"]))
    return Started(place, sizes, _master(environ, len(sizes)), _port(environ, job))


def _master(environ: Mapping[str, str], hosts: int) -> str | None:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if hosts == 1:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand(nodes)[0] if nodes else None


def _port(environ: Mapping[str, str], job: str | None) -> int | None:
    """All processes must come to the same one without having spoken: it follows from the job."""
    if "MASTER_PORT" in environ:
        return int(environ["MASTER_PORT"])
    return FIRST_PORT + int(job) % (LAST_PORT + 1 - FIRST_PORT) if job else None
