"""What to make of a run that failed: the cause among what its ranks tell, and the status."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neox.cluster import report
from neox.cluster.arrival import Missing
from neox.cluster.ranks import Rank, Ranks
from neox.cluster.run_folder import RunFolder

LOG_LINES = 20
_STACK_LINES = 40


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


class Verdict:
    """Judges what is known of the ranks at one moment."""

    def __init__(self, ranks: Ranks, folder: RunFolder, *, several_hosts: bool) -> None:
        self.known = ranks.sorted()
        self.world_size = ranks.world_size
        self.stood_still = ranks.stood_still
        self.folder = folder
        self.several_hosts = several_hosts

    def failure(self, now: float, launcher: int | None) -> Outcome:
        """What no other failure brings about comes first: our own standstill, hosts that are lost,
        processes stopped, the launcher killed. Then silent deaths, from which the others' errors
        follow; then a user's error, from the lowest rank that has it; then the earliest traceback.
        """
        by_kind: dict[str, list[Rank]] = {}
        for rank in self.known:
            if kind := rank.trouble(now):
                by_kind.setdefault(kind, []).append(rank)
        if self.stood_still:
            return self.outcome(
                1,
                f"deepy.py stood still for {self.stood_still:.0f} s, and its ranks have ended "
                "themselves",
                "  somebody sent it SIGSTOP, or its machine slept",
            )
        if silent := by_kind.get("silent"):
            return self._lost(silent, now)
        if stopped := by_kind.get("stopped"):
            return self._stopped(stopped[0])
        if launcher is not None and launcher < 0 and launcher != -signal.SIGPIPE:
            return self._after_launcher(launcher)  # an mpirun's ranks lose their output with it
        if self.cut_off:
            return self._launchers_part()
        if dead := by_kind.get("died", []) + by_kind.get("gone", []):
            return self._death(sorted(dead, key=lambda rank: rank.unwell or 0.0))
        if failed := by_kind.get("error"):
            return self._error(failed)
        return self._after_launcher(launcher)

    @property
    def cut_off(self) -> list[Rank]:
        """Ranks that live, but not what had started them, where others were asked to stop for it.

        So does an mpirun that has lost its process on a host.
        """
        ended = [rank for rank in self.known if rank.is_over and not rank.is_done]
        if not ended or not all(rank.asked for rank in ended):
            return []
        return [rank for rank in self.known if rank.orphan and not rank.is_over]

    @property
    def ended_by_request(self) -> int:
        """The signal that somebody sent to the ranks that have ended, if they died of it; else 0.

        They do where there is no step to end after.
        """
        ended = [rank for rank in self.known if rank.is_over and not rank.is_done]
        died_of_it = all(rank.asked and rank.code == -rank.asked for rank in ended)
        return ended[0].asked if ended and died_of_it else 0

    def outcome(self, status: int, reason: str, detail: str = "", **facts: Any) -> Outcome:
        iteration = max((rank.state.get("iteration", 0) for rank in self.known), default=0)
        text = "\n".join(filter(None, [f"error: {reason}", detail, self._logs()]))
        return Outcome(status, text, reason, True, iteration=iteration, **facts)

    def _logs(self) -> str:
        log_dir = self.folder.job.log_dir
        return f"  logs of the ranks: {log_dir}" if log_dir and self.several_hosts else ""

    def _lost(self, silent: list[Rank], now: float) -> Outcome:
        others = [rank for rank in self.known if rank not in silent]
        since = now - max(rank.heard for rank in silent)
        if stuck := [rank for rank in silent if rank.line.is_delivered]:
            return self._stuck(stuck[0], others, since)
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
        return self.outcome(1, reason, "\n".join(lines), lost=addresses)

    def _stuck(self, rank: Rank, others: list[Rank], since: float) -> Outcome:
        """Its host's kernel takes our messages, and its keeper does not."""
        lines = [f"  the rank was {report.whereabouts(rank)}", *report.waiting(others)]
        lines.append("  its host is there: somebody sent the keeper SIGSTOP, or something holds it")
        who = report.named(rank, self.several_hosts)
        reason = f"the keeper of {who} stopped answering {since:.0f} s ago"
        return self.outcome(1, reason, "\n".join(lines))

    def _stopped(self, rank: Rank) -> Outcome:
        others = [other for other in self.known if other is not rank]
        lines = [f"  it was {report.whereabouts(rank)}", *report.waiting(others)]
        lines.append("  somebody sent it SIGSTOP, or a debugger or a batch system holds it")
        seconds = time.monotonic() - (rank.stopped or 0.0)
        reason = f"{report.named(rank, self.several_hosts)} is stopped since {seconds:.0f} s"
        return self.outcome(1, reason, "\n".join(lines))

    def _death(self, dead: list[Rank]) -> Outcome:
        """Ranks that ended without a word, the earliest first."""
        rank = dead[0]
        code, how = report.explain_end(rank)
        reason = f"{report.named(rank, self.several_hosts)} {how}"
        others = [other for other in self.known if other not in dead]
        hosts = report.lost_hosts(dead, others)
        if self.several_hosts and len(dead) > 1 and rank.host in hosts:
            here = sorted(other.number for other in dead if other.host == rank.host)
            reason += f"; all ranks on {rank.host} have ended so: {', '.join(map(str, here))}"
        if rank.asked:
            reason += f", after {signal.Signals(rank.asked).name} had asked it to stop"
        # Rank 0's is what the console has shown.
        is_shown = rank.number == 0 and self.folder.started_over_hosts
        log = self.folder.log(rank.number, rank.host)
        shown = [] if is_shown else report.last_lines(log, LOG_LINES)
        outcome = self.outcome(code, reason, repeats=code != 128 + signal.SIGKILL)
        text = "\n".join([*shown, outcome.report])
        return dataclasses.replace(outcome, report=text)

    def _error(self, failed: list[Rank]) -> Outcome:
        for rank in failed:
            assert rank.end is not None
            if rank.end.error:
                same = [
                    r for r in failed if r.end is not None and r.end.message == rank.end.message
                ]
                alone = self.several_hosts and len(same) == 1
                where = f" (rank {rank.number} on {rank.host})" if alone else ""
                return Outcome(rank.end.status, f"error: {rank.end.message}{where}")
        rank = min(failed, key=lambda rank: rank.unwell or 0.0)
        assert rank.end is not None
        where = f" on {rank.host}" if self.several_hosts else ""
        if not rank.end.message:
            reason = f"rank {rank.number}{where} left with status {rank.end.status}"
            return self.outcome(rank.end.status, reason, repeats=True)
        text = rank.end.message.rstrip()
        reason = f"rank {rank.number}{where} failed: {text.splitlines()[-1]}"
        outcome = self.outcome(rank.end.status, reason, repeats=True)
        heading = f"rank {rank.number}{where} of {self.world_size} failed:"
        return dataclasses.replace(outcome, report=f"{heading}\n{text}")

    def missing(self, missing: Missing) -> Outcome:
        outcome = self.outcome(1, missing.reason, lost=missing.lost)
        words = self.folder.launchers_words()[-LOG_LINES:] if missing.launcher_tells else []
        return dataclasses.replace(outcome, report="\n".join([*words, outcome.report]))

    def _launchers_part(self) -> Outcome:
        ended = report.listed(rank.number for rank in self.known if rank.is_over)
        hosts = ", ".join(sorted({rank.host for rank in self.cut_off}))
        who = report.listed(rank.number for rank in self.cut_off)
        return self.outcome(
            1,
            f"the launcher's own process on {hosts}, which had started {who}, was killed; "
            f"then the launcher ended {ended}",
        )

    def _after_launcher(self, status: int | None) -> Outcome:
        """The launcher has ended and no rank has failed: it was killed, or started too few."""
        done = {rank.number for rank in self.known if rank.is_done}
        unfinished = sorted(set(range(self.world_size)) - done)
        names = ", ".join(map(str, unfinished)) or "none"
        code, how = report.explain_status(status)
        outcome = self.outcome(code, f"the launcher {how}; ranks not yet done: {names}")
        was_killed = status is not None and status < 0
        words = [] if was_killed else self.folder.launchers_words()[-LOG_LINES:]
        return dataclasses.replace(outcome, report="\n".join([*words, outcome.report]))

    def hang(self, culprits: list[Rank], watchdog_s: float) -> Outcome:
        """Of ranks that keep all from getting on; the first has been asked for its stacks."""
        rank = culprits[0]
        others = [other for other in self.known if other not in culprits]
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
            f"(watchdog_timeout is {watchdog_s:g})"
        )
        return self.outcome(1, reason, "\n".join(lines), repeats=True)


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()[:_STACK_LINES]]
