"""The start of a run: whether the ranks that have not reported yet will ever do so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from neox.cluster import report
from neox.cluster.control import LEASE_S
from neox.cluster.probe import Probe
from neox.cluster.ranks import Ranks
from neox.cluster.run_folder import RunFolder

# pdsh waits for the other hosts. srun and the mpiruns end when they lose one.
_PDSH = re.compile(r"pdsh@\S+: (\S+): ssh (?:exited with exit code (\d+)|was killed.*)")


@dataclass(frozen=True)
class Missing:
    """Why ranks will not report."""

    reason: str
    lost: Mapping[str, str] = field(default_factory=dict)  # silent hosts, and their addresses
    launcher_tells: bool = False  # the launcher's own words say more


class Arrival:
    """Of the ranks of a run; what ends it after they have reported is not seen here."""

    def __init__(
        self, folder: RunFolder, ranks: Ranks, watchdog_s: float, *, several_hosts: bool
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.watchdog_s = watchdog_s
        self.several_hosts = several_hosts
        self.probe = Probe()

    def trouble(self, now: float) -> Missing | None:
        """What keeps the missing ranks away: their host, ssh, or nothing that is known."""
        missing = set(range(self.ranks.world_size)) - self.ranks.known.keys()
        if not missing:
            self.close()
            return None
        if self.several_hosts and (found := self._lost(missing, now) or self._refused(missing)):
            return found
        return self._late(missing, now)

    def close(self) -> None:
        self.probe.close()

    def _lost(self, missing: set[int], now: float) -> Missing | None:
        lost = self.probe.lost({self.folder.job.host_of(rank) for rank in missing}, now)
        if not lost:
            return None
        who = report.listed(rank for rank in missing if self.folder.job.host_of(rank) in lost)
        reason = f"{', '.join(lost)} stopped answering {LEASE_S:.0f} s ago, before {who} started"
        return Missing(reason, lost)

    def _refused(self, missing: set[int]) -> Missing | None:
        for line in self.folder.launchers_words():
            if match := _PDSH.match(line):
                there = [r for r in missing if self.folder.job.host_of(r) == match[1]]
                if there:
                    how = f"with status {match[2]}" if match[2] else "by a signal"
                    who = report.listed(there)
                    reason = f"ssh to {match[1]} ended {how}, before {who} had started there"
                    return Missing(reason, launcher_tells=True)
        return None

    def _late(self, missing: set[int], now: float) -> Missing | None:
        first = self.ranks.first
        if first is None or not self.watchdog_s or now < first + self.watchdog_s:
            return None
        hosts = sorted({rank.host for rank in self.ranks.sorted()})
        return Missing(
            f"{report.listed(missing)} did not start within {self.watchdog_s:g} s "
            f"(watchdog_timeout) of the first; the others are on {', '.join(hosts)}"
        )
