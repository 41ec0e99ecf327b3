"""A web server that misbehaves as it is told, one request after another."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = hashlib.shake_256(b"weights").digest(100_000)
HALF = len(BODY) // 2


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")


@dataclass
class Site:
    """Files by path, and how the next GETs of a path go wrong (`faults`, used up one by one).

    A fault is one of:
    ("drop", n): n bytes of the body, and the connection ends     ("reset", n): it is reset
    ("flip",): a byte of the body is another                      ("status", code, headers)
    ("forget",): the body is another file's, with an ETag of its own
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[tuple]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def gets(self, path: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path == path]

    def etag(self, body: bytes) -> str:
        return f'"{hashlib.md5(body).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        site = self.server.site
        site.requests.append(Request(self.command, self.path, dict(self.headers)))
        faults = site.faults.get(self.path, []) if with_body else []
        fault = faults.pop(0) if faults else ("none",)
        if self.path in site.redirects:
            return self.reply(302, {"Location": site.redirects[self.path]})
        if fault[0] == "status":
            return self.reply(fault[1], fault[2])
        if self.path not in site.files:
            return self.reply(404, {})
        body = site.files[self.path]
        status, headers, start = self.extent(body)
        headers |= site.headers.get(self.path, {})
        sent = body[start:]
        if fault[0] == "flip":
            sent = bytes([sent[0] ^ 1]) + sent[1:]
        if fault[0] in ("drop", "reset"):
            sent = sent[: fault[1]]
        self.reply(status, headers, sent if with_body else b"")
        if fault[0] == "reset":
            self.wfile.flush()
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.connection.close()

    def extent(self, body: bytes) -> tuple[int, dict[str, str], int]:
        """(status, headers, first byte) of the answer to the request's Range."""
        site = self.server.site
        tag = {"ETag": site.etag(body)} if site.etags else {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range", tag.get("ETag"))
        if not site.ranges or not asked or condition != tag.get("ETag"):
            return 200, {"Content-Length": str(len(body)), **tag}, 0
        start = int(asked[1])
        if start >= len(body):
            return 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"}, len(body)
        extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
        length = str(len(body) - start)
        return 206, {"Content-Range": extent, "Content-Length": length, **tag}, start

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, site: Site) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.site = site

    def handle_error(self, *arguments: object) -> None:
        pass  # a client that goes away


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """The site at `site.url`, until the block ends."""
    server = _Server(site)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def publish_on_hub(site: Site, repository: str, revision: str, files: dict[str, bytes]) -> None:
    """Serve a model as the hub does: a listing in two pages, and files behind redirects."""
    entries = []
    for name, body in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry = {"type": "file", "path": name, "size": len(body), "oid": blob}
        if not name.endswith((".json", ".txt", ".md")):
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body)}
        entries.append(entry)
        site.redirects[f"/{repository}/resolve/{revision}/{name}"] = f"/cdn/{name}"
        site.files[f"/cdn/{name}"] = body
    entries.append({"type": "directory", "path": "onnx", "size": 0, "oid": "0" * 40})
    tree = f"/api/models/{repository}/tree/{revision}"
    half = len(entries) // 2
    site.files[tree] = json.dumps(entries[:half]).encode()
    site.headers[tree] = {"Link": f'<{site.url}{tree}?cursor=2>; rel="next"'}
    site.files[f"{tree}?cursor=2"] = json.dumps(entries[half:]).encode()
