"""The ranks of a run as deepy.py knows them: one connection each, asked every second how it is."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from neox.cluster.control import (
    BEAT_S,
    LEASE_S,
    MOST_BYTES,
    PROOF_S,
    STRANGERS_BYTES,
    Line,
    listen,
    proof,
)
from neox.cluster.run_folder import End

STOPPED_S = 5.0  # a rank stands still, stopped, before that ends the run

Trouble = Literal["silent", "stopped", "gone", "died", "error"]


@dataclass
class Rank:
    """What the keeper of one rank has said, and when it was heard."""

    number: int
    host: str
    pid: int
    line: Line
    heard: float
    state: dict[str, Any] = field(default_factory=dict)  # keeper.py's answer
    end: End | None = None  # its last words
    code: int | None = None  # its exit status, -N after signal N
    stopped: float | None = None  # since when it is seen stopped
    unwell: float | None = None  # since when something is known to be wrong
    stacks: str | None = None
    asked: int = 0  # the signal by which somebody asked this rank alone to stop
    orphan: float | None = None  # since when what started it on its host is gone
    address: str = ""

    @property
    def is_over(self) -> bool:
        """Nothing more can come from it."""
        return self.code is not None or not self.line.is_open

    @property
    def is_done(self) -> bool:
        return self.code == 0 and self.end is not None and self.end.status == 0

    def trouble(self, now: float) -> Trouble | None:
        """What is wrong with it."""
        kind = self._trouble(now)
        if kind and self.unwell is None:
            self.unwell = now
        return kind

    def _trouble(self, now: float) -> Trouble | None:
        if self.end is not None and self.end.status != 0:
            return "error"
        if self.code is not None:
            return None if self.is_done else "died"
        if not self.line.is_open:
            return "gone"
        if now - self.heard > LEASE_S:
            return "silent"
        if self.stopped is not None and now - self.stopped > STOPPED_S:
            return "stopped"
        return None


@dataclass
class _Stranger:
    line: Line
    nonce: str
    since: float


class Ranks:
    """Those of a run of `world_size` that have reported, by number."""

    def __init__(self, world_size: int, hosts: Iterable[str] = ()) -> None:
        self.world_size = world_size
        self.listeners, self.address = listen(hosts)
        self.known: dict[int, Rank] = {}
        self.asked: list[int] = []  # signals that ranks or keepers got from somebody
        self.asked_at: float | None = None  # when the first of them came
        self.first: float | None = None  # when the first rank reported
        self._strangers: list[_Stranger] = []
        self.stood_still = 0.0  # seconds that this process did not run, if too many
        self._looked = time.monotonic()
        self._beaten = 0.0
        self._order: dict[str, Any] = {}
        self._later: list[Callable[[], object]] = []

    def sorted(self) -> list[Rank]:
        return [rank for _, rank in sorted(self.known.items())]

    @property
    def are_done(self) -> bool:
        """Whether all have reported and are done."""
        return len(self.known) == self.world_size and all(
            rank.is_done for rank in self.known.values()
        )

    def close(self) -> None:
        for rank in self.known.values():
            rank.line.close()
        for stranger in self._strangers:
            stranger.line.close()
        for listener in self.listeners:
            listener.close()

    def order(self, **message: Any) -> None:
        """`tell`, and say it also to those that are still to come."""
        self._order = message
        self.tell(**message)

    def tell(self, **message: Any) -> None:
        """Say something to every keeper that is there."""
        for rank in self.known.values():
            if rank.line.is_open:
                rank.line.send(**message)

    def beat(self) -> None:
        self._beaten = time.monotonic()
        self.tell(beat=1)

    def later(self, act: Callable[[], object]) -> None:
        """For signal handlers, which may have come in the midst of a message."""
        self._later.append(act)

    def resume(self) -> None:
        """Go on after this process was stopped: the ranks' silence was our own."""
        now = time.monotonic()
        for rank in self.known.values():
            rank.heard = now
        self.tell(paused=False)
        self._looked = now
        self.beat()

    def _notice_standstill(self) -> None:
        """What the ranks have said meanwhile is still to be read."""
        now = time.monotonic()
        if now - self._looked > LEASE_S / 2:
            self.stood_still = now - self._looked if now - self._looked > LEASE_S else 0.0
            for rank in self.known.values():
                rank.heard = now
        self._looked = now

    def look(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for news, and take it in."""
        while self._later:
            self._later.pop(0)()
        self._notice_standstill()
        if time.monotonic() - self._beaten > BEAT_S:
            self.beat()
        poll = select.poll()
        for source in self._sources():
            poll.register(source.fileno(), select.POLLIN)
        with contextlib.suppress(InterruptedError):
            poll.poll(timeout * 1000)
        for listener in self.listeners:
            self._accept(listener)
        for stranger in list(self._strangers):
            self._examine(stranger)
        for rank in self.known.values():
            if rank.line.is_open:
                for message in rank.line.receive():
                    self._take(rank, message)

    def _sources(self) -> list[socket.socket | Line]:
        lines = [rank.line for rank in self.known.values()]
        lines += [stranger.line for stranger in self._strangers]
        return [*self.listeners, *(line for line in lines if line.is_open)]

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                line = Line(connection, STRANGERS_BYTES)
                stranger = _Stranger(line, secrets.token_hex(16), time.monotonic())
                line.send(nonce=stranger.nonce)
                self._strangers.append(stranger)

    def _examine(self, stranger: _Stranger) -> None:
        """Who proves to be a rank becomes one, who does not is turned away."""
        messages = stranger.line.receive()
        now = time.monotonic()
        if not messages:
            if not stranger.line.is_open or now - stranger.since > PROOF_S:
                self._strangers.remove(stranger)
                stranger.line.close()
            return
        self._strangers.remove(stranger)
        rank = self._introduced(stranger, messages[0], now)
        if rank is None:
            stranger.line.close()
            return
        self.known[rank.number] = rank
        self.first = self.first or now
        if self._order:
            rank.line.send(**self._order)
        for message in messages[1:]:
            self._take(rank, message)

    def _introduced(self, stranger: _Stranger, words: dict[str, Any], now: float) -> Rank | None:
        try:
            number, pid, host = int(words["rank"]), int(words["pid"]), str(words["host"])
            theirs = str(words["proof"])
        except (KeyError, TypeError, ValueError):
            return None
        if not 0 <= number < self.world_size or number in self.known:
            return None
        if not hmac.compare_digest(theirs, proof(self.address.key, stranger.nonce, number)):
            return None
        stranger.line.most = MOST_BYTES
        address = stranger.line.connection.getpeername()[0]
        return Rank(number, host, pid, stranger.line, now, address=address)

    def _take(self, rank: Rank, message: dict[str, Any]) -> None:
        rank.heard = time.monotonic()
        if "state" in message:
            rank.state = message["state"]
            is_stopped = rank.state.get("process") == "T"
            rank.stopped = (rank.stopped or rank.heard) if is_stopped else None
        elif "end" in message:
            rank.end = End(**message["end"])
        elif "code" in message:
            rank.code = int(message["code"])
        elif "asked" in message:
            rank.asked = int(message["asked"])
            self.asked.append(rank.asked)
            self.asked_at = self.asked_at or rank.heard
        elif "orphan" in message:
            rank.orphan = rank.heard
        elif "stacks" in message:
            rank.stacks = str(message["stacks"])
