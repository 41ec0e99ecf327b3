"""uvicorn's HTTP protocol with patience that ends: for clients that send or read too slowly.

A slow client costs a connection, so those are limited: of too many that have no request answered,
one is closed, the oldest of those that have sent no whole header if there are any. Good clients
send theirs at once and are never among the oldest for long; what they keep open between two
requests is closed last.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from neox.serving.errors import error_body

_YOUNG_S = 1.0
_BODY = json.dumps(error_body("the request did not come in time", "timeout")).encode()
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


class PatientProtocol(H11Protocol):
    """`seconds` and `most_idle` are set on a subclass, since uvicorn makes the instances."""

    seconds: float
    most_idle: int
    # Without a request that is being answered, and since when; the oldest first.
    idle: dict[PatientProtocol, float]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_reading()
        if len(self.idle) > self.most_idle:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.idle.pop(self, None)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def _watch_reading(self) -> None:
        """A request, header and body, has `seconds` from its first byte, the first from the start.

        Between requests uvicorn's keep-alive timeout counts.
        """
        theirs = self.conn.their_state
        if theirs is h11.IDLE or self._is_refused():
            self.idle.setdefault(self, self.loop.time())
        else:
            self.idle.pop(self, None)
        is_partial = theirs is h11.SEND_BODY or (
            theirs is h11.IDLE and self.timeout_keep_alive_task is None
        )
        if not is_partial and self._reading is not None:
            self._reading.cancel()
            self._reading = None
        elif is_partial and self._reading is None:
            self._reading = self.loop.call_later(self.seconds, self._too_slow)

    def _make_room(self) -> None:
        """Close the oldest of the connections that are worth the least.

        Not one that has just been made, up to twice as many as there may be: the requests of many
        clients that come at once are on their way, and get answers, if only that there are too
        many.
        """
        others = (connection for connection in self.idle if connection is not self)
        least = min(others, key=PatientProtocol._worth)
        is_young = self.loop.time() - self.idle[least] < _YOUNG_S
        if len(self.idle) > 2 * self.most_idle or not is_young:
            del self.idle[least]  # its connection_lost comes later
            least.transport.abort()

    def _is_refused(self) -> bool:
        """Whether the request has its answer and is not whole yet: it was too much, say."""
        cycle = self.cycle
        answered = cycle is not None and cycle.response_complete
        return answered and self.conn.their_state is h11.SEND_BODY

    def _worth(self) -> int:
        """To be kept: without a header the least, between two requests the most."""
        if self.cycle is None:
            return 0
        return 1 if self._is_refused() else 2

    def _too_slow(self) -> None:
        cycle = self.cycle
        amid = cycle is not None and cycle.response_started and not cycle.response_complete
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not amid:
            self.transport.write(_TOO_SLOW)
        self.transport.close()
