"""The script that a launcher starts once per rank: `worker.py RUN_FOLDER`."""

from __future__ import annotations

import dataclasses
import errno
import faulthandler
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from pathlib import Path

from neox import progress
from neox.cluster import processes
from neox.cluster.execute import execute, prepare_environment
from neox.cluster.keeper import Keeper
from neox.cluster.place import Place, find_rank
from neox.cluster.run_folder import End, Job, RunFolder, open_log
from neox.config import NeoXConfig
from neox.errors import NeoXError

# How long a failed rank waits for the launcher to have read its last words and to end the job. Were
# it to leave at once, its peers would fail too, with errors that only distract from the first one.
LAST_WORDS_S = 60.0
MARGIN_S = 300.0  # by which groups wait longer than the watchdog
HALF_AN_HOUR_S = 1800.0  # torch's own time for gloo
_MOST_WORDS = 16_000  # characters: they fit into a pipe that nobody reads yet


def main() -> None:
    """Become the keeper of a rank, and start that as the child which runs its share."""
    del sys.path[0]  # this file's folder: its modules are to be found in their package only
    folder = RunFolder(Path(sys.argv[1]))
    place = _find_place(folder.job)
    page = progress.Page(mmap.mmap(-1, progress.SIZE))
    words, mouth = os.pipe()
    stacks = _unnamed_file()
    keeper = os.getpid()
    pid = os.fork()  # nothing large is imported yet, and there is one thread
    if pid:
        os.close(mouth)
        processes.name_process(f"{processes.KEEPER}{place.rank}")
        status = Keeper(folder, place.rank, pid, page, words, stacks).run()
        os._exit(status)
    processes.die_with_parent(keeper)
    processes.name_process(f"neox-rank-{place.rank}")
    os.close(words)
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    progress.use(page)
    _run_share(folder, place, mouth)


def _run_share(folder: RunFolder, place: Place, mouth: int) -> None:
    """Run this rank's share; leave last words of how it ended."""
    job = folder.job
    try:
        if place.rank > 0:
            _speak_into(folder.log(place.rank, socket.gethostname()))
        elif folder.started_over_hosts:
            log = folder.log(0, socket.gethostname()) if job.log_dir else None
            _speak_through_launcher(log)
        prepare_environment(job, place)
        config = folder.config()
        if job.script is None:
            progress.do("starting")
            _watch_collectives(config, job)
        execute(job, config, folder.config_file, place)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:
        end = _describe(error)
        _say(mouth, end)
        if end.status != 0:
            time.sleep(LAST_WORDS_S)
            _leave(end.status)
    else:
        _say(mouth, End(0))


def _watch_collectives(config: NeoXConfig, job: Job) -> None:
    from neox.parallel import watched
    from neox.parallel.topology import Topology

    replicas = job.world_size // (config.tp * config.pp)
    patience = config.watchdog_timeout + MARGIN_S if job.entry_point == "train" else 0.0
    watched.install(Topology(config.pp, replicas, config.tp), max(patience, HALF_AN_HOUR_S))


def _say(mouth: int, end: End) -> None:
    end = dataclasses.replace(end, message=end.message[-_MOST_WORDS:])
    os.write(mouth, json.dumps(dataclasses.asdict(end)).encode() + b"\n")


def _unnamed_file() -> int:
    """In memory where there is such a thing: it is for when things go wrong, as on a full disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stacks")
    handle, name = tempfile.mkstemp()
    os.unlink(name)
    return handle


def _find_place(job: Job) -> Place:
    rank = find_rank(os.environ)
    if rank is None:
        raise SystemExit("worker.py is started by deepy.py, through a launcher that sets RANK")
    return job.place(rank)


def _speak_into(log: Path) -> None:
    """Only rank 0 has the console; what the others print is kept for the case that they fail."""
    file = open_log(log)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def _speak_through_launcher(log: Path | None) -> None:
    """Send rank 0's output to the console by way of its launcher, and into `log` if it is kept.

    It becomes one stream, for the launcher's standard error has words of its own on it, and no
    terminal, though Open MPI gives one: nobody sits there.
    """
    if os.isatty(1):
        settings = termios.tcgetattr(1)
        settings[1] &= ~termios.OPOST  # or lines would end in \r\n
        termios.tcsetattr(1, termios.TCSANOW, settings)
    if log is not None:
        os.close(open_log(log))  # tee would go on without it
    # What asks a run to stop may ask all of its processes; the last words are still to be heard.
    script = 'trap "" HUP INT TERM USR1 USR2; exec tee "$@"'
    files = [] if log is None else [str(log)]
    tee = subprocess.Popen(["/bin/sh", "-c", script, "sh", *files], stdin=subprocess.PIPE)
    assert tee.stdin is not None
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    tee.stdin.close()


def _describe(error: BaseException) -> End:
    if isinstance(error, NeoXError):
        return End(2, error=True, message=str(error))
    if isinstance(error, BrokenPipeError):
        return End(128 + signal.SIGPIPE, error=True, message="standard output was closed")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or "where its output goes"
        return End(2, error=True, message=f"{error.strerror}: {what}")
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
