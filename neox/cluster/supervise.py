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
from dataclasses import dataclass, field

from neox.cluster import processes, report
from neox.cluster.ranks import Rank, Ranks
from neox.cluster.run_folder import RUN_FOLDER, RunFolder
from neox.progress import STOP_SIGNALS

TICK_S = 0.2
SETTLE_S = 0.5  # after the first failure, for a lower rank's error or an earlier death to show
GRACE_S = 3.0  # between asking processes to end, telling them, and making them
ANSWER_S = 2.0  # for ranks to answer a question
LOG_LINES = 20


@dataclass(frozen=True)
class Outcome:
    """The status to exit with and, unless it is 0, why."""

    status: int
    report: str = ""
    reason: str = ""  # the same in a few words
    may_pass: bool = False  # the same run may succeed another time: it is not the user's error
    lost: Mapping[str, str] = field(default_factory=dict)  # silent hosts, and their addresses
    iteration: int = 0  # the last that was begun
    repeats: bool = False  # it may well fail there again: nothing from outside has ended it


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
        try:
            watch = _Watch(launcher, folder, ranks, watchdog_s, several_hosts=bool(hosts))
            outcome = watch.wait(stop)
        finally:
            # A launcher that is asked to end tells the other hosts. Where there are none it would
            # only print what interrupted it.
            first = signal.SIGTERM if hosts else signal.SIGKILL
            _end_all(launcher, folder, ranks, stop, first, grace_s)
            ranks.close()
    if stop and len(ranks.known) == world_size and all(r.is_done for r in ranks.known.values()):
        return Outcome(0)
    if outcome.report:
        print(outcome.report, file=sys.stderr, flush=True)
    return outcome


@contextlib.contextmanager
def _stop_requests(folder: RunFolder, ranks: Ranks) -> Iterator[list[int]]:
    """The signals that have asked us to stop, as a list that grows.

    The launcher's session is not the terminal's, so the keys' signals come here. While rank 0
    claims them, Ctrl-C is passed on to it, and Ctrl-Z does nothing: rank 0 would read on, beside
    the shell.
    """
    received: list[int] = []

    def request(number: int, frame: object) -> None:
        if number == signal.SIGINT and folder.interrupts_are_claimed and 0 in ranks.known:
            ranks.later(lambda: ranks.known[0].line.send(signal=number))
        else:
            received.append(number)

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
        self.stop = _GentleStop(ranks)
        self.failed: float | None = None  # when the first sign of a failure was seen

    def wait(self, stop: list[int]) -> Outcome:
        while True:
            launcher_is_gone = self.launcher.poll() is not None
            self.ranks.look(0.02 if launcher_is_gone else TICK_S)
            if len(self.ranks.known) == self.ranks.world_size and all(
                rank.is_done for rank in self._known
            ):
                return Outcome(0)
            now = time.monotonic()
            troubles = [rank.trouble(now) for rank in self._known]
            if not launcher_is_gone and not any(troubles):
                self.failed = None  # who was silent has spoken
            elif self.failed is None:
                self.failed = now
                self.ranks.beat()
            if not stop and self.failed is None:
                stop += self.ranks.asked[:1]
            if stop and not self.stop.goes_on(stop):
                return Outcome(128 + stop[0], f"stopped by {signal.Signals(stop[0]).name}")
            if self.failed is not None and self._is_settled(now):
                return self._judge(now)
            if hung := self._hung():
                return self._hang(hung)
            if missing := self._missing(now):
                return self._outcome(1, missing)

    @property
    def _known(self) -> list[Rank]:
        return [rank for _, rank in sorted(self.ranks.known.items())]

    def _is_settled(self, now: float) -> bool:
        """Whether every rank has said how it is since the first sign of a failure.

        One that does not answer is either about to be heard, or lost, which explains the others'.
        """
        assert self.failed is not None
        return now > self.failed + SETTLE_S and all(
            rank.is_over or rank.heard > self.failed or rank.trouble(now) == "silent"
            for rank in self._known
        )

    def _judge(self, now: float) -> Outcome:
        """What no other failure brings about comes first: hosts that are lost, processes stopped.
        Then silent deaths, from which the others' errors follow; then a user's error, from the
        lowest rank that has it; then the earliest traceback."""
        by_kind: dict[str, list[Rank]] = {}
        for rank in self._known:
            if kind := rank.trouble(now):
                by_kind.setdefault(kind, []).append(rank)
        if silent := by_kind.get("silent"):
            return self._lost(silent, now)
        if stopped := by_kind.get("stopped"):
            return self._stopped(stopped[0])
        if dead := by_kind.get("died", []) + by_kind.get("gone", []):
            return self._death(sorted(dead, key=lambda rank: rank.unwell or 0.0))
        if failed := by_kind.get("error"):
            return self._error(failed)
        return self._after_launcher()

    def _outcome(self, status: int, reason: str, detail: str = "", **facts: object) -> Outcome:
        iteration = max((rank.state.get("iteration", 0) for rank in self._known), default=0)
        text = "\n".join(filter(None, [f"error: {reason}", detail, self._logs()]))
        return Outcome(status, text, reason, True, iteration=iteration, **facts)  # type: ignore[arg-type]

    def _logs(self) -> str:
        log_dir = self.folder.job.log_dir
        return f"  logs of the ranks: {log_dir}" if log_dir and self.several_hosts else ""

    def _lost(self, silent: list[Rank], now: float) -> Outcome:
        others = [rank for rank in self._known if rank not in silent]
        since = now - max(rank.heard for rank in silent)
        hosts = report.lost_hosts(silent, others)
        who = report.listed(rank.number for rank in silent)
        what = f"{', '.join(hosts)} stopped answering" if hosts else "stopped answering"
        lines = [f"  {report.named(rank, True)} was {report.whereabouts(rank)}" for rank in silent]
        lines += report.waiting(others)
        lines.append(
            "  its network or its power may have failed; what ran there ends itself within "
            "half a minute"
        )
        addresses = {rank.host: rank.address for rank in silent if rank.host in hosts}
        reason = f"{what} {since:.0f} s ago, with {who}" if hosts else f"{who} {what}"
        return self._outcome(1, reason, "\n".join(lines), lost=addresses)

    def _stopped(self, rank: Rank) -> Outcome:
        others = [other for other in self._known if other is not rank]
        lines = [f"  it was {report.whereabouts(rank)}", *report.waiting(others)]
        lines.append("  somebody sent it SIGSTOP, or a debugger or a batch system holds it")
        seconds = time.monotonic() - (rank.stopped or 0.0)
        reason = f"{report.named(rank, self.several_hosts)} is stopped since {seconds:.0f} s"
        return self._outcome(1, reason, "\n".join(lines))

    def _death(self, dead: list[Rank]) -> Outcome:
        """Ranks that ended without a word, the earliest first."""
        rank = dead[0]
        if rank.code is None:  # its keeper was killed, and that kills the rank
            code, how = 128 + signal.SIGKILL, "was killed, and its keeper with it"
        else:
            code, how = report.explain_status(rank.code)
        reason = f"{report.named(rank, self.several_hosts)} {how}"
        others = [other for other in self._known if other not in dead]
        hosts = report.lost_hosts(dead, others)
        if self.several_hosts and len(dead) > 1 and rank.host in hosts:
            here = [other.number for other in dead if other.host == rank.host]
            reason += f"; all ranks on {rank.host} have ended so: {', '.join(map(str, here))}"
        shown = report.last_lines(self.folder.log(rank.number), LOG_LINES)
        outcome = self._outcome(code, reason, repeats=code != 128 + signal.SIGKILL)
        text = "\n".join([*shown, outcome.report])
        return dataclasses.replace(outcome, report=text)

    def _error(self, failed: list[Rank]) -> Outcome:
        for rank in failed:
            assert rank.end is not None
            if rank.end.error:
                where = f" (rank {rank.number} on {rank.host})" if self.several_hosts else ""
                return Outcome(rank.end.status, f"error: {rank.end.message}{where}")
        rank = min(failed, key=lambda rank: rank.unwell or 0.0)
        assert rank.end is not None
        where = f" on {rank.host}" if self.several_hosts else ""
        if not rank.end.message:
            reason = f"rank {rank.number}{where} left with status {rank.end.status}"
            return self._outcome(rank.end.status, reason, repeats=True)
        text = rank.end.message.rstrip()
        reason = f"rank {rank.number}{where} failed: {text.splitlines()[-1]}"
        outcome = self._outcome(rank.end.status, reason, repeats=True)
        heading = f"rank {rank.number}{where} of {self.ranks.world_size} failed:"
        return dataclasses.replace(outcome, report=f"{heading}\n{text}")

    def _after_launcher(self) -> Outcome:
        """The launcher has ended and no rank has failed: it was killed, or started too few."""
        status = self.launcher.returncode
        done = {rank.number for rank in self._known if rank.is_done}
        unfinished = sorted(set(range(self.ranks.world_size)) - done)
        names = ", ".join(map(str, unfinished)) or "none"
        code, how = report.explain_status(status)
        return self._outcome(code, f"DeepSpeed's launcher {how}; ranks not yet done: {names}")

    def _hung(self) -> list[Rank]:
        """The ranks that do not get on, once the first of them has not for too long."""
        if not self.watchdog_s:
            return []
        running = [rank for rank in self._known if not rank.is_over and rank.state]
        if not any(rank.state["idle"] > self.watchdog_s for rank in running):
            return []
        return [rank for rank in running if rank.state["idle"] > self.watchdog_s / 2]

    def _missing(self, now: float) -> str:
        """Says which ranks have never reported, long after the first one has."""
        first = self.ranks.first
        missing = set(range(self.ranks.world_size)) - self.ranks.known.keys()
        if not missing or first is None or not self.watchdog_s or now < first + self.watchdog_s:
            return ""
        who, hosts = report.listed(missing), sorted({rank.host for rank in self._known})
        return (
            f"{who} did not start within {self.watchdog_s:g} s (watchdog_timeout) of the first; "
            f"the others are on {', '.join(hosts)}"
        )

    def _hang(self, idle: list[Rank]) -> Outcome:
        culprits = report.suspects(idle)
        for rank in culprits[:1]:
            rank.line.send(stacks=True)
            deadline = time.monotonic() + ANSWER_S
            while rank.stacks is None and time.monotonic() < deadline:
                self.ranks.look(TICK_S)
        rank = culprits[0]
        others = [other for other in self._known if other not in culprits]
        seconds = rank.state["idle"]
        lines = [f"  it was {report.whereabouts(rank)}"]
        lines += [f"  so was {report.named(o, self.several_hosts)}" for o in culprits[1:4]]
        lines += report.waiting(others)
        if rank.stacks:
            lines += ["  what Python was doing there:", *_indented(rank.stacks)]
        lines.append(
            "  a step that really takes so long needs a larger watchdog_timeout; 0 turns it off"
        )
        reason = (
            f"{report.named(rank, self.several_hosts)} has done nothing for {seconds:.0f} s "
            f"(watchdog_timeout is {self.watchdog_s:g})"
        )
        return self._outcome(1, reason, "\n".join(lines), repeats=True)


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()[:40]]


class _GentleStop:
    """Ends a training run after a step, the same on every rank: see neox.progress.begin_step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asked: float | None = None
        self.held = False
        self.stop_after: int | None = None

    def goes_on(self, stop: list[int]) -> bool:
        """Take the next step towards it; False where the run is to be ended now."""
        if stop[0] not in STOP_SIGNALS or len(stop) > 1:
            return False
        known = list(self.ranks.known.values())
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            self.ranks.beat()
        heard = len(known) == self.ranks.world_size and all(
            rank.is_over or rank.heard > self.asked for rank in known
        )
        if not self.held:
            if heard and all(rank.state.get("stoppable") for rank in known):
                self.held = True
                self.ranks.tell(hold=stop[0])
                return True
            may_answer = len(known) == self.ranks.world_size and not heard
            return may_answer and now < self.asked + ANSWER_S
        running = [rank for rank in known if not rank.is_over]
        if self.stop_after is None and all(rank.state.get("held") for rank in running):
            self.stop_after = max((rank.state["iteration"] for rank in running), default=1)
            self.ranks.tell(stop_after=max(self.stop_after, 1))
        return True


def _end_all(
    launcher: subprocess.Popen[bytes],
    folder: RunFolder,
    ranks: Ranks,
    stop: list[int],
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
        ranks.tell(signal=stop[0])
        wait(grace_s)
    ranks.tell(kill=1)
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
