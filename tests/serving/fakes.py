"""A decoder without a model, and a server around it on a free port."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from neox.config import from_dict
from neox.errors import RequestError
from neox.inference.request import Progress, Request, TokenLogprobs
from neox.parallel.groups import ProcessGroups
from neox.serving.app import build_app
from neox.serving.engine import Engine
from neox.serving.replica import Replica
from neox.serving.run import build_service
from neox.serving.server import Server, address, listen
from neox.serving.service import Service
from neox.tokenizer import load_tokenizer
from tests.models import BASE

FORBIDDEN = "!never!"  # a stop string that the decoder refuses


@dataclass
class _Row:
    id: int
    request: Request
    given: list[int] = field(default_factory=list)


class FakeDecoder:
    """After each prompt come the letters from "a" on, starting `seed` letters later, up to `end`.

    A token is a byte, as in CharLevelTokenizer. A step gives every running row one token. While
    `gate` is not set, no step is taken: then tests know what is waiting and running.
    """

    def __init__(self, rows: int = 2, step_s: float = 0.0, end: str = "z") -> None:
        self.rows = rows
        self.step_s = step_s
        self.end = end
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None  # what the next step raises
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> int:
        if FORBIDDEN in request.stop:
            raise RequestError("this stop string is refused")
        self.submitted.append(request)
        self._waiting.append(_Row(len(self.submitted), request))
        return len(self.submitted)

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        self._running = [row for row in self._running if row.id != id]
        self._waiting = deque(row for row in self._waiting if row.id != id)

    def step(self) -> list[Progress]:
        while self._waiting and len(self._running) < self.rows:
            self._running.append(self._waiting.popleft())
        self.gate.wait(0.05 if not self.gate.is_set() else 0)  # commands are taken in between
        if not self.gate.is_set():
            return []
        if self.error is not None:
            raise self.error
        time.sleep(self.step_s)
        progress = [self._advance(row) for row in self._running]
        ended = {entry.id for entry in progress if entry.finish}
        self._running = [row for row in self._running if row.id not in ended]
        return progress

    def _advance(self, row: _Row) -> Progress:
        request = row.request
        token = ord("a") + (request.seed + len(row.given)) % 26
        row.given.append(token)
        text = chr(token)
        finish: Any = None
        enough = len(row.given) > request.minimum_tokens
        if enough and (text in (*request.stop, self.end) or token in request.ends):
            text, finish = "", "stop"
        elif len(row.given) == request.maximum_tokens:
            finish = "length"
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.logprobs is not None:
            likeliest = [(token, -0.5), (token - 1, -1.5), (0, float("-inf"))]
            logprobs = (TokenLogprobs(token, -0.5, tuple(likeliest[: request.logprobs])),)
        return Progress(row.id, (token,), text, logprobs, finish)


@dataclass
class Running:
    """A server that answers."""

    url: str
    decoder: FakeDecoder
    service: Service
    server: Server

    @property
    def engine(self) -> Engine:
        return self.service.engine


def config(**values: Any) -> Any:
    model = {"seq_length": 512, "max_position_embeddings": 512}
    return from_dict(
        {**BASE, **model, "tokenizer_type": "CharLevelTokenizer", "serve_rows": 2} | values
    )


@contextlib.contextmanager
def serving(
    decoder: FakeDecoder | None = None,
    keys: tuple[str, ...] = (),
    template: Any = None,
    **values: Any,
) -> Iterator[Running]:
    """A server over `decoder` on a free port, with the configuration's `values`."""
    settings = config(**values)
    decoder = decoder or FakeDecoder(settings.serve_rows)
    service = build_service(settings, load_tokenizer("CharLevelTokenizer"))
    if template is not None:
        service = Service(**{**service.__dict__, "template": template})
    listener = listen("127.0.0.1", 0)
    app = build_app(
        service,
        keys,
        settings.serve_max_body,
        settings.serve_connections,
        settings.serve_cors_origins or (),
    )
    server = Server(
        app,
        service.engine,
        listener,
        settings.serve_io_timeout,
        settings.serve_connections,
        settings.serve_grace,
    )
    with server.running():
        replica = Replica(decoder, ProcessGroups.single())
        thread = threading.Thread(target=_decode, args=(service.engine, replica), daemon=True)
        thread.start()
        wait_until(lambda: service.engine.state != "loading")
        try:
            yield Running(address(listener, "127.0.0.1"), decoder, service, server)
        finally:
            decoder.gate.set()
    thread.join(timeout=10)
    assert not thread.is_alive()


def _decode(engine: Engine, replica: Replica) -> None:
    with contextlib.suppress(ArithmeticError):  # what tests make decoders raise
        engine.open(replica.decoder)
        engine.run(replica)


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Poll until `condition()` holds; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
