"""The small process beside each rank: it tells deepy.py how its rank is, and ends it when it must.

It imports neither torch nor anything else that could hang, and does all of its work over one
connection and one pipe, so that neither a stuck rank nor a full disk keeps it from speaking.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

from neox import progress
from neox.cluster import processes
from neox.cluster.allocation import cancel_job
from neox.cluster.control import BEAT_S, LEASE_S, Address, Line, connect
from neox.cluster.run_folder import RunFolder

_STACKS_S = 1.0  # for a rank to write its stacks
_HELD_S = 0.1  # from telling a rank to hold until what it has begun is certain


class Keeper:
    """Of the rank that runs as process `pid`; `words` is the pipe that it speaks into."""

    def __init__(
        self, folder: RunFolder, rank: int, pid: int, page: progress.Page, words: int, stacks: int
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.pid = pid
        self.page = page
        self.words = words
        self.stacks = stacks
        self.said = b""
        self.end: dict[str, Any] | None = None  # its last words, until they are passed on
        self.code: int | None = None  # how the rank ended
        self.is_silent = False  # nothing more will come through the pipe
        self.ended = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None  # readable then
        self.heard = time.monotonic()
        self.paused = False
        self.held_at: float | None = None
        self.asked: list[int] = []
        self.launcher = os.getppid()  # or its part on this host, until that is gone
        self.is_orphan = False
        self.mark, self.moved = page.mark(), time.monotonic()

    def run(self) -> int:
        """Until the rank has ended and deepy.py knows, or the run is over; its exit status."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the rank's, or the user's terminal's
        for number in progress.STOP_SIGNALS:
            signal.signal(number, self._ask)
        address = Address.read(self.folder.path)
        try:
            line = connect(address, self.rank, self.pid)
        except OSError as error:
            text = f"rank {self.rank} on {socket.gethostname()} cannot reach deepy.py on "
            print(f"error: {text}{address.host} at {error}", file=sys.stderr, flush=True)
            return self._abandon(is_gone=False)
        return self._keep(line)

    def _keep(self, line: Line) -> int:
        told = False
        self.heard = time.monotonic()
        while True:
            self._look(line)
            self._tell(line)
            for message in line.receive():
                self.heard = time.monotonic()
                if "kill" in message:
                    self._end_rank()
                    if not self.folder.is_here:  # there deepy.py itself sees to the rest
                        processes.kill_run(self.folder.path, but=(os.getpid(), os.getppid()))
                        processes.kill_daemon(self.launcher)
                    return 1
                self._obey(line, message)
            if self.code is not None and not told:
                line.send(code=self.code)
                told = True
            line.flush()
            if told and self.code == 0 and line.is_flushed:
                return 0
            silent = time.monotonic() - self.heard
            if not line.is_open or (silent > LEASE_S and not self.paused):
                return self._abandon(is_gone=not line.is_open)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def _look(self, line: Line) -> None:
        """Wait a moment for anything to happen; notice what has."""
        sources: list[Any] = [line, self.words] if not self.is_silent else [line]
        sources += [self.ended] if self.ended is not None else []
        ready, _, _ = select.select(sources, [], [], BEAT_S / 2)
        if self.words in ready:
            self._read_words()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                if self.ended is not None:
                    os.close(self.ended)
                    self.ended = None
                while not self.is_silent and select.select([self.words], [], [], 0)[0]:
                    self._read_words()
        if self.page.mark() != self.mark:
            self.mark, self.moved = self.page.mark(), time.monotonic()
        if self.page.asked and self.page.stoppable and self.held_at is None:
            self.asked.append(self.page.asked)
            self.page.asked = 0

    def _read_words(self) -> None:
        data = os.read(self.words, 1 << 16)
        self.said += data
        self.is_silent = not data
        if self.said.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                self.end = json.loads(self.said)
            self.said = b""

    def _tell(self, line: Line) -> None:
        """Pass on what deepy.py should know at once."""
        if not self.is_orphan and os.getppid() != self.launcher:
            self.is_orphan = True
            line.send(orphan=True)
        while self.asked:  # one by one: a handler may add to it at any time
            line.send(asked=self.asked.pop(0))
        if self.end is not None:
            line.send(end=self.end)
            self.end = None

    def _obey(self, line: Line, message: dict[str, Any]) -> None:
        if "beat" in message:
            line.send(state=self._state())
        elif "signal" in message and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, int(message["signal"]))
        elif "hold" in message:
            self.page.asked = int(message["hold"])
            self.held_at, self.page.hold = time.monotonic(), True
        elif "stop_after" in message:
            self.page.stop_after = int(message["stop_after"])
        elif "stacks" in message:
            line.send(stacks=self._read_stacks())
        elif "paused" in message:
            self.paused = bool(message["paused"])

    def _state(self) -> dict[str, Any]:
        now, at = time.monotonic(), self.page.read()
        return {
            "process": processes.state(self.pid),
            "iteration": at.iteration,
            "doing": at.doing,
            "call": at.call,
            "number": at.number,
            "size": at.size,
            "since": now - at.since if at.call else 0.0,
            "waiting": at.waiting,
            "stoppable": at.stoppable,
            "held": self.held_at is not None and now - self.held_at > _HELD_S,
            "idle": now - self.moved,
        }

    def _read_stacks(self) -> str:
        """What the rank's threads are at, in Python; "" from a process that does not answer."""
        if self.code is not None or processes.state(self.pid) == "T":
            return ""
        with contextlib.suppress(OSError):
            os.ftruncate(self.stacks, 0)
            os.lseek(self.stacks, 0, os.SEEK_SET)
            os.kill(self.pid, signal.SIGUSR2)
            deadline = time.monotonic() + _STACKS_S
            text, before = "", None
            while time.monotonic() < deadline and (not text or text != before):
                time.sleep(0.1)
                before, text = text, os.pread(self.stacks, 1 << 16, 0).decode(errors="replace")
            return text
        return ""

    def _abandon(self, is_gone: bool) -> int:
        """End what there is of the run on this host: deepy.py is gone, or at least out of reach."""
        self._end_rank()
        processes.kill_run(self.folder.path, but=(os.getpid(),))
        if self.folder.is_here:
            cancel_job(self.folder.path)
        else:
            processes.kill_daemon(self.launcher)
        if is_gone or self.folder.is_here:
            self.folder.remove()
        return 1

    def _end_rank(self) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
