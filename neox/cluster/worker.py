"""The script that a launcher starts once per rank: `worker.py RUN_FOLDER`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from neox.cluster.execute import Place, execute, prepare_environment
from neox.cluster.run_folder import End, RunFolder
from neox.errors import ConfigError, NeoXError

# How long a failed rank waits for the launcher to have read its last words and to end the job. Were
# it to leave at once, its peers would fail too, with errors that only distract from the first one.
LAST_WORDS_S = 10.0

# The names under which launchers tell a process its place: DeepSpeed's (and torchrun's), Slurm's,
# OpenMPI's and PMI's (MPICH, MVAPICH).
_PLACES = (
    ("RANK", "LOCAL_RANK", "LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def main() -> None:
    """Run this rank's share; leave a record of how it ended."""
    del sys.path[0]  # this file's folder: its modules are to be found in their package only
    folder = RunFolder(Path(sys.argv[1]))
    job = folder.job
    place = _find_place()
    try:
        folder.write_start(place.rank)
        if job.host == socket.gethostname():
            folder.end_with_launcher()
        if place.rank > 0:
            _speak_into(folder.log(place.rank))
        prepare_environment(job, place)
        execute(job, folder.config(), folder.config_file, place)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:
        end = _describe(error)
        folder.write_end(place.rank, end)
        if end.status != 0:
            time.sleep(LAST_WORDS_S)
            _leave(end.status)
    else:
        folder.write_end(place.rank, End(0))


def _find_place() -> Place:
    for rank, local_rank, local_size in _PLACES:
        if rank in os.environ:
            return Place(
                int(os.environ[rank]),
                int(os.environ.get(local_rank, 0)),
                int(os.environ.get(local_size, 1)),
            )
    raise SystemExit("worker.py is started by deepy.py, through a launcher that sets RANK")


def _speak_into(log: Path) -> None:
    """Only rank 0 has the console; what the others print is kept for the case that they fail."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise ConfigError(f"log_dir: {log} cannot be written: {error.strerror}.") from error
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def _describe(error: BaseException) -> End:
    if isinstance(error, NeoXError):
        return End(2, error=True, message=str(error))
    if isinstance(error, BrokenPipeError):
        return End(128 + signal.SIGPIPE, error=True, message="standard output was closed")
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return End(error.code or 0)
        return End(1, error=True, message=str(error.code))
    return End(1, message=traceback.format_exc())


def _leave(status: int) -> None:
    """Exit without the interpreter's and the libraries' farewells, which may wait for peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
