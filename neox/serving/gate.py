"""What every request passes: how many there may be, whose they are, how large, and who still waits.

An ASGI middleware around the application. It reads the body, so that an endpoint runs only once all
of a request is there, and ends an endpoint whose client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neox.serving.errors import ApiError, Overloaded, TooLarge, WrongKey
from neox.serving.metrics import Metrics
from neox.serving.page import FILES
from neox.serving.responses import error_response

# The page asks for a key itself, and those that watch a server have none.
OPEN = frozenset({*FILES, "/health"})


class _Gone(Exception):
    """The client has left before its request was whole."""


class Gate:
    """Turns away what is too much, too large or not allowed, before any of it is looked at."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, keys: Iterable[str], max_body: int, most: int
    ) -> None:
        """`keys`: those that are let in, everybody without any; `most`: requests at a time."""
        self._app = app
        self._metrics = metrics
        self._keys = [_digest(key.encode()) for key in keys]
        self._max_body = max_body
        self._most = most
        self._active = 0
        self._sending: dict[asyncio.Timeout, None] = {}  # of bodies on their way, the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # of nginx: the client has closed the connection

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._active += 1
        try:
            await self._serve(scope, receive, noting)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, noting)
        except _Gone:
            pass
        finally:
            self._active -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self._active > self._most:
            self._make_room()
        if self._keys and scope["path"] not in OPEN and not self._knows(headers):
            raise WrongKey()
        body = await self._read(headers, receive)
        given = asyncio.Event()

        async def again() -> Message:
            if given.is_set():  # whether the client is there is watched here
                await asyncio.Event().wait()
            given.set()
            return {"type": "http.request", "body": body, "more_body": False}

        answering = asyncio.ensure_future(self._app(scope, again, send))
        watching = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answering
                raise _Gone
            await answering
        finally:
            watching.cancel()
            answering.cancel()  # where this task itself is cancelled

    def _make_room(self) -> None:
        """Turn away who has been sending a body for longest. Raises Overloaded where nobody is.

        Good clients send theirs at once, and are never among the oldest for long.
        """
        for oldest in self._sending:
            del self._sending[oldest]
            oldest.reschedule(0)
            return
        raise Overloaded()

    def _knows(self, headers: Headers) -> bool:
        """In a time that does not depend on how much of a key is right."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1", errors="replace"))
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise TooLarge(self._max_body)
        body = bytearray()
        more = True
        place = asyncio.timeout(None)
        try:
            async with place:
                self._sending[place] = None
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_body:
                        raise TooLarge(self._max_body)
        except TimeoutError:
            raise Overloaded() from None
        finally:
            self._sending.pop(place, None)
        return bytes(body)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _digest(key: bytes) -> bytes:
    """Of equal length, whatever the keys' are."""
    return hashlib.sha256(key).digest()
