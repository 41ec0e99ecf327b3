"""The one decoder, between the thread that decodes and the event loop that answers.

`Engine.run` is the decoding thread's whole work (rank 0's main thread: torch stays where it was set
up). Everything else here is called on the event loop's thread. Commands go one way through a queue,
events the other way through `call_soon_threadsafe`; nothing else is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from neox.errors import RequestError
from neox.inference.request import Progress, Request
from neox.serving.errors import EngineFailed, Overloaded, TimedOut, Unavailable
from neox.serving.metrics import Metrics
from neox.serving.replica import Accepted, Cancel, Command, Decoder, Event, Replica, Stop, Submit

# How often rank 0 speaks to ranks that wait for it, far below a collective's timeout.
HEARTBEAT_S = 60.0

State = Literal["loading", "ready", "stopping", "failed"]


class Engine:
    """Requests in, tokens out; at most `capacity` sequences at a time, running or waiting."""

    def __init__(self, capacity: int, request_timeout: float, metrics: Metrics) -> None:
        """`request_timeout` in seconds, from the request to its last token."""
        self.capacity = capacity
        self.request_timeout = request_timeout
        self.metrics = metrics
        self.state: State = "loading"
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()  # a signal handler may put
        self._tickets = itertools.count()
        self._runs: dict[int, Run] = {}  # by ticket; of the event loop's thread
        self._loop: asyncio.AbstractEventLoop | None = None

    # the decoding thread

    def open(self, decoder: Decoder) -> None:
        """Take requests from now on; `run` follows.

        Call it before a signal may stop the server, which it would undo.
        """
        self.metrics.watch(decoder)
        self.state = "ready"

    def run(self, replica: Replica) -> None:
        """Decode until `stop`. Collective over the world: other ranks call `follow`.

        What the decoder raises is raised here; whoever waits for an answer is told.
        """
        try:
            while (events := replica.advance(self._next_commands(replica.decoder))) is not None:
                if events:
                    self._to_loop(self._deliver, events)
        except BaseException:
            self.state = "failed"
            self._to_loop(self.fail_all, EngineFailed())
            raise

    def _next_commands(self, decoder: Decoder) -> list[Command]:
        """What has come in; waits for something while there is nothing to decode."""
        commands: list[Command] = []
        if decoder.idle:
            with contextlib.suppress(queue.Empty):
                commands.append(self._commands.get(timeout=HEARTBEAT_S))
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands

    def _to_loop(self, call: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None, "attached before it runs"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(call, *arguments)

    # any thread

    def stop(self) -> None:
        """Make `run` return, on every rank."""
        self._commands.put(Stop())

    # the event loop's thread

    def attach(self) -> None:
        """Deliver to the loop that calls this."""
        self._loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def running(self, requests: Sequence[Request]) -> AsyncIterator[Run]:
        """The requests, accepted by the decoder; on the way out, those unfinished are cancelled.

        Raises Unavailable, Overloaded (there is no room for all of them), RequestError (one can
        never be served), TimedOut.
        """
        if self.state != "ready":
            raise Unavailable(self.state)
        if len(self._runs) + len(requests) > self.capacity:
            raise Overloaded()
        run = Run(self.request_timeout)
        for request in requests:
            ticket = next(self._tickets)
            run.add(ticket)
            self._runs[ticket] = run
            self._commands.put(Submit(ticket, request))
        try:
            await run.accepted()
            yield run
        finally:
            self.metrics.cancellations.inc(sum(map(self._drop, run.open)))

    def fail_all(self, error: Exception) -> None:
        """End every request with `error` and free the rows."""
        for ticket, run in list(self._runs.items()):
            self._drop(ticket)
            run.put(ticket, error)

    def _drop(self, ticket: int) -> bool:
        """Whether the decoder had it."""
        if self._runs.pop(ticket, None) is None:
            return False
        self._commands.put(Cancel(ticket))
        return True

    def _deliver(self, events: Sequence[Event]) -> None:
        for ticket, event in events:
            run = self._runs.get(ticket)
            if run is None:  # dropped meanwhile
                continue
            if isinstance(event, Progress):
                self._measure(run.since(ticket), len(event.tokens))
            if isinstance(event, RequestError) or (
                isinstance(event, Progress) and event.finish is not None
            ):
                del self._runs[ticket]
            run.put(ticket, event)

    def _measure(self, since: tuple[float, bool], tokens: int) -> None:
        seconds, is_first = since
        if tokens:
            histogram = self.metrics.first_token if is_first else self.metrics.per_token
            histogram.observe(seconds if is_first else seconds / tokens)
            self.metrics.generated_tokens.inc(tokens)


class Run:
    """The sequences of one HTTP request, as their tokens come."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: until all of it must be there."""
        self.open: dict[int, int] = {}  # ticket -> index of the request, while it is not finished
        self._started = time.monotonic()
        self._last: dict[int, float] = {}  # ticket -> when its last token came
        self._seconds = seconds
        self._unaccepted: set[int] = set()
        self._accepted = asyncio.Event()  # or one is refused:
        self._error: Exception | None = None
        self._events: asyncio.Queue[tuple[int, Progress | Exception]] = asyncio.Queue()

    def add(self, ticket: int) -> None:
        self.open[ticket] = len(self.open)
        self._unaccepted.add(ticket)

    def put(self, ticket: int, event: Progress | Accepted | Exception) -> None:
        self._unaccepted.discard(ticket)
        if isinstance(event, Exception):
            self._error = event
            self._accepted.set()
        if not isinstance(event, Accepted):
            self._events.put_nowait((ticket, event))
        if not self._unaccepted:
            self._accepted.set()

    def since(self, ticket: int) -> tuple[float, bool]:
        """Seconds since the ticket's last token, or since the start: then the token is the first.

        The next call counts from this one.
        """
        now = time.monotonic()
        before = self._last.get(ticket)
        self._last[ticket] = now
        return now - (self._started if before is None else before), before is None

    async def accepted(self) -> None:
        """Wait for the decoder to have taken every request, or to have refused one."""
        async with self._in_time():
            await self._accepted.wait()
        if self._error is not None:
            raise self._error

    async def progress(self) -> AsyncIterator[tuple[int, Progress]]:
        """(index of the request, what it got), until every request is finished."""
        while self.open:
            async with self._in_time():
                ticket, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            index = self.open[ticket]
            if event.finish is not None:
                del self.open[ticket]
            if event.finish == "error":
                raise EngineFailed(event.message or "")
            yield index, event

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._started + self._seconds - time.monotonic()):
                yield
        except TimeoutError:
            raise TimedOut(self._seconds) from None
