"""Ending a training run after a step, the same on every rank: see neox.progress.begin_step."""

from __future__ import annotations

import time

from neox.cluster.ranks import Ranks
from neox.progress import STOP_SIGNALS

ANSWER_S = 2.0  # for ranks to say whether they can
ECHO_S = 3.0  # within which the same signal is the same request


class Requests:
    """The signals that have asked the run to stop.

    A batch system may send one to a script, which passes it on, to deepy.py and to the ranks.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._last = 0.0

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def first(self) -> int:
        return self.numbers[0]

    def add(self, number: int) -> None:
        now = time.monotonic()
        is_echo = number in self.numbers and number in STOP_SIGNALS and now < self._last + ECHO_S
        self._last = now
        if not is_echo:
            self.numbers.append(number)

    def forget(self) -> None:
        self.numbers.clear()


class GentleStop:
    """Takes one step of it after the other, as the ranks answer."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.asked: float | None = None
        self.held = False
        self.stop_after: int | None = None

    def goes_on(self, stop: Requests) -> bool:
        """Take the next step towards it; False where the run is to be ended now."""
        if stop.first not in STOP_SIGNALS or len(stop) > 1:
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
                self.ranks.tell(hold=stop.first)
                return True
            may_answer = len(known) == self.ranks.world_size and not heard
            return may_answer and now < self.asked + ANSWER_S
        running = [rank for rank in known if not rank.is_over]
        if self.stop_after is None and all(rank.state.get("held") for rank in running):
            self.stop_after = max((rank.state["iteration"] for rank in running), default=1)
            self.ranks.tell(stop_after=max(self.stop_after, 1))
        return True
