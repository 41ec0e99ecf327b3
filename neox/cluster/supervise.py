"""Start a launcher, watch its ranks, and say truly how it ended.

DeepSpeed's launcher reports some failures as success (a kill -9 of its inner process, any signal)
and leaves orphans when it is asked to stop. So it runs in a session of its own, of which nothing
survives this module; success is every rank's word that it is done, and nothing less.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from neox.cluster.run_folder import RUN_FOLDER, RunFolder

TICK_S = 0.2
SETTLE_S = 0.5  # after the first failure, for a lower rank's error or an earlier death to show
GRACE_S = 3.0  # between asking processes to end, telling them, and making them
LOG_LINES = 20

_OUT_OF_MEMORY = (
    "if nobody did that by hand, the machine ran out of memory (dmesg tells): "
    "use fewer processes, a smaller micro-batch or, to serve, fewer serve_rows"
)


@dataclass(frozen=True)
class Outcome:
    """The status to exit with and, unless it is 0, why."""

    status: int
    report: str = ""


def supervise(
    command: list[str],
    environment: Mapping[str, str],
    folder: RunFolder,
    world_size: int,
    *,
    several_hosts: bool = False,
    grace_s: float = GRACE_S,
) -> int:
    """Run `command` until every rank is done or one has failed; end everything; return the status.

    0 when all `world_size` ranks said so, also if they did when they were asked to stop; 2 for a
    NeoXError, printed once; 128 + N when signal N ended a rank or this process was asked to stop by
    it; else what the first failing rank gave. Ranks that are asked to stop have `grace_s` seconds.
    """
    leash = folder.hold_leash()
    with _terminal_as_before(), _stop_requests(folder) as stop:
        launcher = subprocess.Popen(
            command, env={**environment, RUN_FOLDER: str(folder.path)}, start_new_session=True
        )
        try:
            outcome = _Watch(launcher, folder, world_size).wait(stop)
        finally:
            # A launcher that is asked to end tells the other hosts. Where there are none it would
            # only print what interrupted it.
            first = signal.SIGTERM if several_hosts else signal.SIGKILL
            _end_all(launcher, folder, stop, first, grace_s)
            os.close(leash)
    if stop and [end.status for end in folder.ends().values()] == [0] * world_size:
        return 0
    if outcome.report:
        print(outcome.report, file=sys.stderr, flush=True)
    return outcome.status


@contextlib.contextmanager
def _stop_requests(folder: RunFolder) -> Iterator[list[int]]:
    """The signals that have asked us to stop, as a list that grows.

    The launcher's session is not the terminal's, so the keys' signals come here. While rank 0
    claims them, Ctrl-C is passed on to it, and Ctrl-Z does nothing: rank 0 would read on, beside
    the shell.
    """
    received: list[int] = []

    def request(number: int, frame: object) -> None:
        if number == signal.SIGINT and folder.interrupts_are_claimed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(folder.starts()[0].pid, number)
        else:
            received.append(number)

    def suspend(number: int, frame: object) -> None:
        if not folder.interrupts_are_claimed:
            os.kill(os.getpid(), signal.SIGSTOP)

    handlers: dict[int, Callable[[int, object], None]] = {
        signal.SIGINT: request,
        signal.SIGTERM: request,
        signal.SIGTSTP: suspend,
    }
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        handlers[signal.SIGHUP] = request
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def _terminal_as_before() -> Iterator[None]:
    """A rank that is killed while its user types a line leaves the terminal without an echo."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(terminal) == os.getpgrp():  # in the background it is another's
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class _Watch:
    """Waits for the first thing that decides how a run ended."""

    def __init__(
        self, launcher: subprocess.Popen[bytes], folder: RunFolder, world_size: int
    ) -> None:
        self.launcher = launcher
        self.folder = folder
        self.world_size = world_size
        self.poll = select.poll()
        self.ranks: dict[int, int] = {}  # process file descriptor -> rank, while it runs
        self.gone: dict[int, int | None] = {}  # ranks that have been seen to end, and how
        self.died: list[int] = []  # those that did so without a word, or badly after a good one

    def wait(self, stop: list[int]) -> Outcome:
        deadline = None
        while True:
            launcher_is_gone = self.launcher.poll() is not None
            self._look(timeout=0.0 if launcher_is_gone else TICK_S)
            if stop:
                return Outcome(128 + stop[0], f"stopped by {signal.Signals(stop[0]).name}")
            if self.died or any(end.status != 0 for end in self.folder.ends().values()):
                deadline = deadline or time.monotonic() + SETTLE_S
                if launcher_is_gone or time.monotonic() > deadline:
                    return self._failure()
            elif launcher_is_gone:
                return self._after_launcher()
            elif self._all_done():
                return Outcome(0)

    def _look(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for a rank to end; notice those that are new."""
        for rank, start in self.folder.starts().items():
            if rank in self.gone or rank in self.ranks.values():
                continue
            if start.host != socket.gethostname() or not hasattr(os, "pidfd_open"):
                continue  # another host, or not Linux: the launcher's status must do
            try:
                process = os.pidfd_open(start.pid)
            except ProcessLookupError:
                self._ended(rank)
            else:
                self.ranks[process] = rank
                self.poll.register(process, select.POLLIN)
        for process, _ in self.poll.poll(timeout * 1000):
            self.poll.unregister(process)
            os.close(process)
            self._ended(self.ranks.pop(process))

    def _ended(self, rank: int) -> None:
        status = self.gone[rank] = _zombie_status(self.folder.starts()[rank].pid)
        end = self.folder.ends().get(rank)
        if end is None or (end.status == 0 and status):
            self.died.append(rank)

    def _all_done(self) -> bool:
        """Every rank has said so and left; the launcher would notice within a second or two."""
        return [0] * self.world_size == list(self.gone.values())

    def _failure(self) -> Outcome:
        """A silent death comes first, since the others' errors follow from it; then a user's error,
        from the lowest rank that has it; then the earliest traceback."""
        if self.died:
            return self._death(self.died[0])
        ends = {rank: end for rank, end in self.folder.ends().items() if end.status != 0}
        for rank in sorted(ends):
            if ends[rank].error:
                return Outcome(ends[rank].status, f"error: {ends[rank].message}")
        rank = min(ends, key=lambda rank: ends[rank].time)
        if ends[rank].message:
            report = f"rank {rank} of {self.world_size} failed:\n{ends[rank].message.rstrip()}"
        else:
            report = f"error: rank {rank} left with status {ends[rank].status}"
        return Outcome(ends[rank].status, report)

    def _death(self, rank: int) -> Outcome:
        pid, status = self.folder.starts()[rank].pid, self.gone[rank]
        if status is None:  # its parent has taken the status, and passes it on
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.launcher.wait(GRACE_S)
        code, how = _explain_status(status)
        report = f"error: rank {rank} (pid {pid}) {how}"
        log = self.folder.log(rank)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return Outcome(code, "\n".join([*lines[-LOG_LINES:], report]))

    def _after_launcher(self) -> Outcome:
        """The launcher has ended and no rank has failed: it has done its work, or was killed."""
        status = self.launcher.returncode
        unfinished = sorted(set(range(self.world_size)) - set(self.folder.ends()))
        if status == 0 and not unfinished:
            return Outcome(0)
        ranks = ", ".join(map(str, unfinished)) or "none"
        code, how = _explain_status(status)
        report = f"error: the launcher {how}; ranks not yet done: {ranks}"
        return Outcome(code, "\n".join([*self.folder.launchers_words()[-LOG_LINES:], report]))


def _zombie_status(pid: int) -> int | None:
    """The exit status of a process that its parent has not yet asked about, as Popen's returncode.

    It is the last field of /proc/PID/stat; None when that is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None


def _explain_status(status: int | None) -> tuple[int, str]:
    """Our exit status, and words for a process's. DeepSpeed passes signal N on as 256 - N."""
    if status is not None and status >= 192:
        status -= 256
    if status is None or status >= 0:
        return status or 1, f"ended with status {status}, without saying why"
    try:
        name = f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        name = f"signal {-status}"
    hint = f"; {_OUT_OF_MEMORY}" if -status == signal.SIGKILL else ""
    return 128 - status, f"was killed by {name}{hint}"


def _end_all(
    launcher: subprocess.Popen[bytes],
    folder: RunFolder,
    stop: list[int],
    first: signal.Signals,
    grace_s: float,
) -> None:
    """Leave no process of the run. A second request to stop cuts the waiting short.

    `first` goes to the launcher's process group; what has left it, such as W&B's service, is asked
    politely before it is made to.
    """
    if stop:  # the ranks get what we got, and time to act on it
        for start in folder.starts().values():
            if start.host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(start.pid, stop[0])
        _wait_for_end(launcher, folder, stop, grace_s)
    for to_group, to_strays in ((first, signal.SIGTERM), (signal.SIGKILL, signal.SIGKILL)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, to_group)
        for pid in _strays(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, to_strays)
        _wait_for_end(launcher, folder, stop, GRACE_S)


def _wait_for_end(
    launcher: subprocess.Popen[bytes], folder: RunFolder, stop: list[int], grace_s: float
) -> None:
    deadline = time.monotonic() + grace_s
    requests = len(stop)
    while time.monotonic() < deadline and len(stop) == requests:
        launcher.poll()  # or it would stay in its group as a zombie
        try:
            os.killpg(launcher.pid, 0)
        except ProcessLookupError:
            if not _strays(folder):
                return
        time.sleep(0.05)


def _strays(folder: RunFolder) -> list[int]:
    """The run's processes by their environment: some leave the launcher's process group."""
    mark = f"{RUN_FOLDER}={folder.path}\0".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found
