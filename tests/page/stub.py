"""The API as the page sees it, with answers that a test writes piece by piece."""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from neox.serving.page import FILES, HEADERS

PATIENCE = 30.0  # seconds for what should take milliseconds, on a machine that does much else


def event(value: object) -> bytes:
    """One server-sent event; characters beyond ASCII stay bytes of UTF-8."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


class Answer:
    """A stream that the page waits for: what is sent here arrives there at once."""

    def __init__(self, body: dict[str, Any], channel: socket.socket) -> None:
        self.body = body  # what was asked
        self._channel = channel
        self._left = threading.Event()

    def send(self, data: bytes) -> None:
        self._channel.sendall(data)

    def say(self, *pieces: str) -> None:
        for text in pieces:
            self.send(piece(text))

    def end(self, finish: str = "stop", tokens: int | None = None) -> None:
        self.send(piece("", finish))
        if tokens is not None:
            self.send(event({"choices": [], "usage": {"completion_tokens": tokens}}))
        self.send(b"data: [DONE]\n\n")
        self.hang_up()

    def hang_up(self) -> None:
        self._channel.close()

    def abandoned(self) -> bool:
        """Whether the page closed the connection, which a server takes for a cancellation."""
        return self._left.wait(PATIENCE)

    def relay(self, channel: socket.socket, client: socket.socket) -> None:
        """What the channel brings, to the client, until one of them goes."""
        while True:
            readable, _, _ = select.select([channel, client], [], [])
            if client in readable:  # it has asked everything: this is its goodbye
                self._left.set()
                return
            data = channel.recv(65536)
            if not data:
                return
            client.sendall(data)


@dataclass
class Refusal:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, status: int, message: str, **headers: str) -> Refusal:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps({"error": {"message": message}}).encode(), named)


class Stub:
    """A server on a free port of this machine; `close` ends it.

    models: what `/v1/models` names. key: what it wants, if anything. refusal: how it answers a
    completion instead of streaming. length: the Content-Length that a stream claims, if any.
    automatic: answers are as long as they may be, and nobody has to write them.
    """

    def __init__(self) -> None:
        self.models = ["tiny"]
        self.key: str | None = None
        self.refusal: Refusal | None = None
        self.length: int | None = None
        self.automatic = False
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.stub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self) -> Answer:
        """The next stream that the page asks for; waits until it does."""
        return self._answers.get(timeout=PATIENCE)

    @property
    def asked(self) -> bool:
        """Whether there is a stream that `answer` has not taken."""
        return not self._answers.empty()

    def open(self, body: dict[str, Any], client: socket.socket) -> None:
        """Make an answer of a request and serve it, in the request's thread."""
        if self.automatic:
            with suppress(ConnectionError):  # the page may go when it likes
                for number in range(body["max_tokens"]):
                    client.sendall(piece(f" {number}"))
                client.sendall(piece("", "length") + b"data: [DONE]\n\n")
            return
        ours, theirs = socket.socketpair()
        answer = Answer(body, theirs)
        self._answers.put(answer)
        with ours:
            answer.relay(ours, client)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path in FILES:
            file, media_type = FILES[self.path]
            self._reply(200, file.read_bytes(), {"Content-Type": media_type, **HEADERS})
        elif self.path == "/v1/models" and self._may():
            models = [{"id": name, "object": "model"} for name in self._stub.models]
            self._reply(200, json.dumps({"object": "list", "data": models}).encode())
        elif self.path != "/v1/models":
            self._refuse(Refusal.of(404, "There is nothing here"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        if self._stub.refusal:
            return self._refuse(self._stub.refusal)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self._stub.length is not None:
            self.send_header("Content-Length", str(self._stub.length))
        self.end_headers()
        self._stub.open(body, self.connection)

    @property
    def _stub(self) -> Stub:
        return self.server.stub  # type: ignore[attr-defined]

    def _may(self) -> bool:
        key = self._stub.key
        allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
        if not allowed:
            self._refuse(Refusal.of(401, "Incorrect API key provided"))
        return allowed

    def _refuse(self, refusal: Refusal) -> None:
        self._reply(refusal.status, refusal.body, refusal.headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
