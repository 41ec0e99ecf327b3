"""Files over HTTP that arrive whole: resumed, retried, taken from several servers, verified.

A file grows under a name that ends in .part and tells which version of the file it is a part of, so
that a later run goes on with it or starts anew. It gets its own name when size and checksum are
right.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from neox import log
from neox.errors import CheckpointError

ATTEMPTS = 6  # in a row that bring no byte, before a server is given up
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_SILENCE = 30  # seconds without a byte that make a connection a dropped one
_LONGEST_WAIT = 600  # seconds that a server may ask for
_CHUNK = 1 << 20

Report = Callable[[int], object]
Item, Result = TypeVar("Item"), TypeVar("Result")


class Unavailable(Exception):
    """A server does not give what was asked for; another may. The text says why."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class RemoteFile:
    """A file to be fetched to `path` (below the output folder, with slashes) from any of `urls`.

    `digest` is what the source publishes: "sha256:..." or git's name of the contents,
    "git-sha1:...". `version` is the ETag or Last-Modified of a source that publishes none.
    """

    path: str
    urls: tuple[str, ...]
    bytes: int
    digest: str | None = None
    version: str | None = None

    def part(self, folder: Path) -> Path:
        """Where the file grows; another version of it grows elsewhere."""
        identity = hashlib.sha256(f"{self.digest or self.version} {self.bytes}".encode())
        return folder / f"{self.path}.{identity.hexdigest()[:8]}.part"

    def verify(self, path: Path) -> None:
        """Compare size and digest; without a digest, the checksums inside a .pt file.

        Raises CheckpointError, FileNotFoundError.
        """
        size = path.stat().st_size
        if size != self.bytes:
            raise CheckpointError(f"it has {size:,} bytes and should have {self.bytes:,}")
        if self.digest:
            kind, _, wanted = self.digest.partition(":")
            found = _digest(path, kind)
            if found != wanted:
                raise CheckpointError(f"its {kind} is {found} and should be {wanted}")
        elif self.path.endswith(".pt"):
            from neox.checkpoint.files import check_crc  # imports torch

            check_crc(path)


def _digest(path: Path, kind: str) -> str:
    if kind == "git-sha1":  # what git calls a blob of these contents
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        state = hashlib.new(kind)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


class Client:
    """HTTP with patience, through the proxies that the environment names."""

    def __init__(
        self,
        wait: Callable[[float], object] | None = None,
        token: str | None = None,
        token_for: str = "",
    ) -> None:
        """`wait` sleeps between attempts. `token` goes to URLs that begin with `token_for` only."""
        self.stop = threading.Event()  # set: every transfer ends at its next byte
        self._wait = wait or self.stop.wait
        self._token, self._token_for = token, token_for
        self._opener = urllib.request.build_opener(_Redirects)

    def read(self, url: str) -> tuple[bytes, Message]:
        """A small document and its headers. Raises Unavailable."""
        return self._patiently(url, "GET", lambda response: (response.read(), response.headers))

    def head(self, url: str) -> Message:
        """A file's headers. Raises Unavailable."""
        return self._patiently(url, "HEAD", lambda response: response.headers)

    def _patiently(self, url: str, method: str, take: Callable[[HTTPResponse], Any]) -> Any:
        patience = _Patience(url, self._wait, self.stop)
        while True:
            try:
                with self._open(url, {}, method) as response:
                    return take(response)
            except (OSError, http.client.HTTPException) as error:
                patience.failed(error)

    def fetch(self, file: RemoteFile, folder: Path, report: Report) -> None:
        """Put a file into its place, whole and verified, going on where an earlier run stopped.

        `report` is told of the bytes as they come, and of bytes given up as a negative number.
        Raises CheckpointError when no server gives it or the disk does not take it.
        """
        target, part = folder / file.path, file.part(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in target.parent.glob(f"{target.name}.*.part"):
            if other != part:
                other.unlink()
        problems = []
        for url in file.urls:
            try:
                self._fetch_from(url, file, part, report)
            except Unavailable as error:
                problems.append(f"  {url}: {error}")
            else:
                os.replace(part, target)
                return
        raise CheckpointError(
            f"{file.path} ({file.bytes:,} bytes) could not be fetched:\n"
            + "\n".join(problems)
            + "\nRun the same command again later, or name another server with --mirror, or put "
            f"the file at {target} by hand first. What is finished is kept."
        )

    def _fetch_from(self, url: str, file: RemoteFile, part: Path, report: Report) -> None:
        """Make `part` whole and right; what arrives damaged is fetched once more."""
        for last in (False, True):
            self._receive(url, file, part, report)
            try:
                return file.verify(part)
            except CheckpointError as error:
                report(-part.stat().st_size)
                part.unlink()
                if last:
                    raise Unavailable(f"it arrived damaged, twice: {error}") from error
                log.warning(f"{url} arrived damaged ({error}); fetching it once more")

    def _receive(self, url: str, file: RemoteFile, part: Path, report: Report) -> None:
        """Append to `part` until it has all its bytes."""
        patience = _Patience(url, self._wait, self.stop)
        part.touch()
        furthest = part.stat().st_size
        while (have := part.stat().st_size) < file.bytes:
            try:
                self._continue(url, file, part, have, report)
            except (OSError, http.client.HTTPException) as error:
                if part.stat().st_size > furthest:  # a server without ranges starts again each time
                    furthest = part.stat().st_size
                    patience.restart()
                patience.failed(error)

    def _continue(self, url: str, file: RemoteFile, part: Path, have: int, report: Report) -> None:
        """One request for the bytes from `have` on; they are appended as they come."""
        headers = {}
        if have and (file.digest or file.version):  # else nothing tells if it is the same version
            headers["Range"] = f"bytes={have}-"
        if have and file.version:
            headers["If-Range"] = file.version
        with self._open(url, headers) as response:
            position, total = _extent(response)
            if total not in (None, file.bytes):
                raise Unavailable(f"it has {total:,} bytes there and should have {file.bytes:,}")
            if position not in (0, have):
                raise Unavailable(f"asked for byte {have:,} on, it sends byte {position:,} on")
            report(position - have)  # the server may start again
            with open(part, "r+b") as output:
                output.truncate(position)
                output.seek(position)
                while position < file.bytes and (chunk := response.read1(_CHUNK)):
                    if self.stop.is_set():
                        raise Unavailable("stopped")
                    chunk = chunk[: file.bytes - position]
                    _write(output, chunk)
                    report(len(chunk))
                    position += len(chunk)
                os.fsync(output.fileno())
        if position < file.bytes:
            raise ConnectionError(f"the connection ended at byte {position:,} of {file.bytes:,}")

    @contextmanager
    def _open(
        self, url: str, headers: dict[str, str], method: str = "GET"
    ) -> Iterator[HTTPResponse]:
        """One request. Unavailable: refused; OSError and HTTPException: worth another attempt."""
        if self.stop.is_set():
            raise Unavailable("stopped")
        always = {"Accept-Encoding": "identity", "User-Agent": "neox-fetch"}
        request = urllib.request.Request(url, headers=always | headers, method=method)
        if self._token and url.startswith(self._token_for):
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            response = self._opener.open(request, timeout=_SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _BUSY:
                raise
            raise Unavailable(f"HTTP {error.code} {error.reason}", error.code) from error
        with response:
            yield response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects; a token stays with the host that it was meant for."""

    def redirect_request(self, request, response, code, message, headers, url):
        redirected = super().redirect_request(request, response, code, message, headers, url)
        if redirected:
            redirected.method = request.get_method()  # HEAD would become GET
        if redirected and urlsplit(url).netloc == urlsplit(request.full_url).netloc:
            for name, value in request.unredirected_hdrs.items():
                redirected.add_unredirected_header(name, value)
        return redirected


class _Patience:
    """Counts failures in a row, and waits longer after each."""

    def __init__(self, url: str, wait: Callable[[float], object], stop: threading.Event) -> None:
        self.url, self.wait, self.stop = url, wait, stop
        self.failures = 0
        self.reached = False

    def restart(self) -> None:
        self.failures = 0
        self.reached = True

    def failed(self, error: Exception) -> None:
        """Wait for another attempt. Raises Unavailable when there have been enough."""
        self.failures += 1
        reason = _reason(error)
        if self.failures >= self._attempts(error) or self.stop.is_set():
            attempts = f" ({self.failures} attempts)" if self.failures > 1 else ""
            raise Unavailable(f"{reason}{attempts}") from error
        seconds = _asked_to_wait(error)
        if seconds is None:
            # Spread out, so that the clients of a server that was down do not all come at once.
            seconds = 2**self.failures * random.uniform(0.5, 1.0)
        log.warning(f"{self.url}: {reason}; trying again in {seconds:.0f} s")
        self.wait(seconds)

    def _attempts(self, error: Exception) -> int:
        """Without a network no name is known: then another attempt is a wait for nothing."""
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if self.reached or not isinstance(cause, socket.gaierror):
            return ATTEMPTS
        return 2 if cause.errno == socket.EAI_AGAIN else 1


def _asked_to_wait(error: Exception) -> float | None:
    """The seconds of a Retry-After header, which is a number or a date."""
    value = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    if not value:
        return None
    if value.strip().isdigit():
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return f"no answer for {_SILENCE} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """(the byte that the response starts with, the bytes of the whole file or None)."""
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match:
            raise Unavailable("it sends a part of the file and does not say which")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _write(output: BinaryIO, data: bytes) -> None:
    """What the disk refuses is fatal, unlike what the network does."""
    try:
        output.write(data)
        output.flush()
    except OSError as error:
        raise CheckpointError(f"{output.name} cannot be written: {error.strerror}.") from error


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int
) -> Iterator[tuple[Item, Result]]:
    """(item, result) as they are done, `jobs` at a time. The first error is raised.

    The threads end with the program, so that neither Ctrl-C nor an error has to wait for a server
    that is silent.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Item, Result | Exception]] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def take_turns() -> None:
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item)))
            except Exception as error:
                done.put((item, error))
                return

    for _ in range(min(jobs, len(items))):
        threading.Thread(target=take_turns, daemon=True).start()
    for _ in items:
        item, result = done.get()
        if isinstance(result, Exception):
            raise result
        yield item, result
