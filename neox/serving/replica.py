"""The ranks that hold the served model, which all do what rank 0 says.

A decoder is a replicated state machine: the same requests and cancellations in the same order, and
the same number of steps, give the same tokens on every rank. So rank 0 sends its commands before
every step, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from neox.errors import RequestError
from neox.inference.request import Progress, Request
from neox.parallel.groups import ProcessGroups


class Decoder(Protocol):
    """What serving asks of neox.inference.decoder."""

    @property
    def idle(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, id: int) -> None: ...
    def step(self) -> list[Progress]: ...


@dataclass(frozen=True)
class Submit:
    ticket: int  # rank 0's number for the request
    request: Request


@dataclass(frozen=True)
class Cancel:
    ticket: int


@dataclass(frozen=True)
class Stop:
    """Leave."""


@dataclass(frozen=True)
class Accepted:
    """The decoder has taken a request."""


Command = Submit | Cancel | Stop
Event = tuple[int, Progress | Accepted | RequestError]  # a ticket, and what came of it


class Replica:
    """One rank's decoder, kept in step with the other ranks'."""

    def __init__(self, decoder: Decoder, groups: ProcessGroups) -> None:
        """Collective over the world, which is one replica."""
        assert groups.dp == 1, "one replica is served"
        self.decoder = decoder
        self._ids: dict[int, int] = {}  # ticket -> the decoder's id, while a request is with it
        self._tickets: dict[int, int] = {}  # and back
        # Commands are on the CPU, and waiting for them must not keep a GPU busy as NCCL's would.
        several = groups.world_size > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def advance(self, commands: Sequence[Command]) -> list[Event] | None:
        """Do what rank 0's `commands` say, then one step; what came of it, or None after a Stop.

        Collective over the world; other ranks' `commands` are not looked at.
        """
        events: list[Event] = []
        for command in self._share(commands):
            match command:
                case Submit(ticket, request):
                    try:
                        id = self.decoder.submit(request)
                    except RequestError as error:
                        events.append((ticket, error))
                    else:
                        self._ids[ticket], self._tickets[id] = id, ticket
                        events.append((ticket, Accepted()))
                case Cancel(ticket):
                    if ticket in self._ids:
                        self.decoder.cancel(self._forget(ticket))
                case Stop():
                    return None
        if not self.decoder.idle:
            for progress in self.decoder.step():
                if progress.id not in self._tickets:
                    continue  # it has been cancelled
                events.append((self._tickets[progress.id], progress))
                if progress.finish is not None:
                    self._forget(self._tickets[progress.id])
        return events

    def _forget(self, ticket: int) -> int:
        id = self._ids.pop(ticket)
        del self._tickets[id]
        return id

    def _share(self, commands: Sequence[Command]) -> Sequence[Command]:
        if self._group is None:
            return commands
        shared: list[Any] = [list(commands)]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        return shared[0]


def follow(replica: Replica) -> None:
    """Do as rank 0 does until it stops: the whole work of every other rank."""
    while replica.advance(()) is not None:
        pass
