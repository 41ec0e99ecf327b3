"""Start a launcher, watch its ranks, and say truly how it ended.

DeepSpeed's launcher reports some failures as success (a kill -9 of its inner process, any signal)
and leaves orphans when it is asked to stop. So it runs in a session of its own, of which nothing
survives this module; success is every rank's word that it is done, and nothing less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from neox.cluster import processes, report
from neox.cluster.arrival import Arrival
from neox.cluster.ranks import Rank, Ranks
from neox.cluster.run_folder import RUN_FOLDER, RunFolder
from neox.cluster.stopping import GentleStop, Requests
from neox.cluster.verdict import Outcome, Verdict

TICK_S = 0.2
SETTLE_S = 0.5  # after the first failure, for a lower rank's error or an earlier death to show
GRACE_S = 3.0  # between asking processes to end, telling them, and making them
HEARSAY_S = 1.0  # for keepers, which look twice a second, to tell that their launcher is gone
LOSS_S = 10.0  # between that and what the launcher does about it on other hosts
STACKS_S = 3.0  # for a rank to show its Python stacks


def supervise(
    command: list[str],
    environment: Mapping[str, str],
    folder: RunFolder,
    world_size: int,
    *,
    hosts: Iterable[str] = (),
    grace_s: float = GRACE_S,
    watchdog_s: float = 0.0,
) -> Outcome:
    """Run `command` until every rank is done or one has failed; end everything; say how it went.

    Status 0 when all `world_size` ranks said so, also if they did when they were asked to stop; 2
    for a NeoXError, printed once; 128 + N when signal N ended a rank or this process was asked to
    stop by it; else what the first failing rank gave. Ranks that are asked to stop, and cannot do
    so after a step, have `grace_s` seconds. `hosts` are those of several; with `watchdog_s`, a rank
    that does nothing for so many seconds has failed.
    """
    hosts = list(hosts)
    ranks = Ranks(world_size, hosts)
    ranks.address.write(folder.path)
    with _terminal_as_before(), _stop_requests(folder, ranks) as stop:
        launcher = subprocess.Popen(
            command, env={**environment, RUN_FOLDER: str(folder.path)}, start_new_session=True
        )
        watch = _Watch(launcher, folder, ranks, watchdog_s, several_hosts=bool(hosts))
        try:
            outcome = watch.wait(stop)
        finally:
            watch.arrival.close()
            # A launcher that is asked to end tells the other hosts. Where there are none it would
            # only print what interrupted it.
            first = signal.SIGTERM if hosts else signal.SIGKILL
            _end_all(launcher, folder, ranks, stop, first, grace_s)
            ranks.close()
    if stop and ranks.are_done:
        return Outcome(0)
    if outcome.report:
        print(outcome.report, file=sys.stderr, flush=True)
    return dataclasses.replace(outcome, may_pass=outcome.may_pass and not stop)


@contextlib.contextmanager
def _stop_requests(folder: RunFolder, ranks: Ranks) -> Iterator[Requests]:
    """The signals that have asked us to stop, which may become more.

    The launcher's session is not the terminal's, so the keys' signals come here. While rank 0
    claims them, Ctrl-C is passed on to it, and Ctrl-Z does nothing: rank 0 would read on, beside
    the shell.
    """
    received = Requests()

    def request(number: int, frame: object) -> None:
        if number == signal.SIGINT and folder.interrupts_are_claimed and 0 in ranks.known:
            ranks.later(lambda: ranks.known[0].line.send(signal=number))
        else:
            received.add(number)

    def suspend(number: int, frame: object) -> None:
        if not folder.interrupts_are_claimed:
            ranks.later(stand_still)

    def stand_still() -> None:
        ranks.tell(paused=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        ranks.resume()

    handlers: dict[int, Callable[[int, object], None]] = {
        signal.SIGINT: request,
        signal.SIGTERM: request,
        signal.SIGUSR1: request,
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
        self,
        launcher: subprocess.Popen[bytes],
        folder: RunFolder,
        ranks: Ranks,
        watchdog_s: float,
        *,
        several_hosts: bool,
    ) -> None:
        self.launcher = launcher
        self.folder = folder
        self.ranks = ranks
        self.watchdog_s = watchdog_s
        self.several_hosts = several_hosts
        self.stop = GentleStop(ranks)
        self.arrival = Arrival(folder, ranks, watchdog_s, several_hosts=several_hosts)
        self.failed: float | None = None  # when the first sign of a failure was seen

    def wait(self, stop: Requests) -> Outcome:
        while True:
            launcher_is_gone = self.launcher.poll() is not None
            self.ranks.look(0.02 if launcher_is_gone else TICK_S)
            if self.ranks.are_done:
                return Outcome(0)
            now = time.monotonic()
            troubles = [rank.trouble(now) for rank in self.ranks.sorted()]
            if not launcher_is_gone and not any(troubles):
                self.failed = None  # who was silent has spoken
                self.ranks.stood_still = 0.0
            elif self.failed is None:
                self.failed = now
                self.ranks.beat()
            if not stop and self.failed is None and self._are_asked(now):
                stop.add(self.ranks.asked[0])
            if stop and not self.stop.goes_on(stop):
                return Outcome(128 + stop.first, f"stopped by {signal.Signals(stop.first).name}")
            if self.failed is not None and self._is_settled(now):
                verdict = self._verdict()
                if verdict.cut_off:
                    stop.forget()  # it was the launcher that asked
                elif number := verdict.ended_by_request:
                    return Outcome(128 + number, f"stopped by {signal.Signals(number).name}")
                return verdict.failure(now, self.launcher.returncode)
            if hung := self._hung():
                return self._hang(hung)
            if self.failed is None and (missing := self.arrival.trouble(now)):
                return self._verdict().missing(missing)

    def _are_asked(self, now: float) -> bool:
        """Whether somebody has asked ranks themselves to stop.

        So does a launcher that has lost its process on a host, whose ranks tell of that, and then
        it kills them: that is a failure.
        """
        asked = self.ranks.asked_at
        if asked is None or now < asked + HEARSAY_S:
            return False
        orphans = [rank.orphan for rank in self.ranks.sorted() if rank.orphan is not None]
        return not any(abs(asked - since) < LOSS_S for since in orphans)

    def _is_settled(self, now: float) -> bool:
        """Whether every rank has said how it is since the first sign of a failure.

        One that does not answer is either about to be heard, or lost, which explains the others'.
        """
        assert self.failed is not None
        return now > self.failed + SETTLE_S and all(
            rank.is_over or rank.heard > self.failed or rank.trouble(now) == "silent"
            for rank in self.ranks.sorted()
        )

    def _hung(self) -> list[Rank]:
        """The ranks that do not get on, once the first of them has not for too long."""
        if not self.watchdog_s:
            return []
        running = [rank for rank in self.ranks.sorted() if not rank.is_over and rank.state]
        if not any(rank.state["idle"] > self.watchdog_s for rank in running):
            return []
        return [rank for rank in running if rank.state["idle"] > self.watchdog_s / 2]

    def _hang(self, idle: list[Rank]) -> Outcome:
        """Judge ranks that do not get on, once the first culprit has shown what it is at."""
        culprits = report.suspects(idle)
        culprits[0].line.send(stacks=True)
        deadline = time.monotonic() + STACKS_S
        while culprits[0].stacks is None and time.monotonic() < deadline:
            self.ranks.look(TICK_S)
        return self._verdict().hang(culprits, self.watchdog_s)

    def _verdict(self) -> Verdict:
        return Verdict(self.ranks, self.folder, several_hosts=self.several_hosts)


def _end_all(
    launcher: subprocess.Popen[bytes],
    folder: RunFolder,
    ranks: Ranks,
    stop: Requests,
    first: signal.Signals,
    grace_s: float,
) -> None:
    """Leave no process of the run. A second request to stop cuts the waiting short.

    `first` goes to the launcher's process group; what has left it, such as W&B's service, is asked
    politely before it is made to. On other hosts the keepers do the same.
    """

    def wait(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        requests = len(stop)
        while time.monotonic() < deadline and len(stop) == requests:
            launcher.poll()  # or it would stay in its group as a zombie
            ranks.look(0.05)
            if _is_empty(launcher.pid) and not processes.of_run(folder.path):
                now = time.monotonic()
                if all(
                    rank.is_over or rank.trouble(now) == "silent" for rank in ranks.known.values()
                ):
                    return

    if stop:  # the ranks get what we got, and time to act on it
        ranks.order(signal=stop.first)
        wait(grace_s)
    ranks.order(kill=1)
    for to_group, to_strays in ((first, signal.SIGTERM), (signal.SIGKILL, signal.SIGKILL)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, to_group)
        for pid in processes.of_run(folder.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, to_strays)
        wait(GRACE_S)


def _is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
