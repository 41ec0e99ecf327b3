"""The connection between deepy.py and the keeper of each rank: a message is a line of JSON.

    deepy.py -> keeper                          keeper -> deepy.py
    {"nonce"}            prove who you are      {"rank", "proof", "host", "pid"}
    {"beat"}             every second           {"state"}  the answer: how its rank is
    {"signal": N}        for the rank           {"asked": N}  somebody sent it signal N
    {"hold"}             before the next step   {"end"}, {"code"}  last words, exit status
    {"stop_after": I}    the last iteration     {"orphan"}  what started it has ended
    {"stacks"}           what Python is doing   {"stacks": text}
    {"paused": bool}     Ctrl-Z stops deepy.py
    {"kill"}             the run is over

A keeper proves that it belongs to the run by the HMAC of a nonce; the key is in the run's folder,
which only the user can read, and never on the network. Nothing that comes in is executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import socket
import sys
import termios
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEAT_S = 1.0
LEASE_S = 20.0  # of silence, until a host is given up by either side
PROOF_S = 10.0  # for a stranger to prove that it is none
MOST_BYTES = 1 << 20  # of a message
STRANGERS_BYTES = 4096
_FILE = "control.json"


class Line:
    """Messages over a connection; neither end waits for the other."""

    def __init__(self, connection: socket.socket, most: int = MOST_BYTES) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.is_open = True
        self.most = most
        self._in = b""
        self._out = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def is_flushed(self) -> bool:
        return not self._out

    @property
    def is_delivered(self) -> bool:
        """Whether the other host has acknowledged all that was sent (Linux; else false)."""
        if not self.is_open or self._out or not hasattr(termios, "TIOCOUTQ"):
            return False
        try:
            left = fcntl.ioctl(self.connection, termios.TIOCOUTQ, b"\0" * 4)
        except OSError:
            return False
        return int.from_bytes(left, sys.byteorder) == 0

    def send(self, **message: Any) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes now; a silent other end is no reason to wait."""
        try:
            while self.is_open and self._out:
                self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            if len(self._out) > self.most:
                self._out = b""  # it has not listened for long, and will be given up
        except OSError:
            self.is_open = False

    def receive(self) -> list[dict[str, Any]]:
        """What has come; `is_open` is false afterwards when that was the last."""
        try:
            while self.is_open:
                data = self.connection.recv(1 << 16)
                self._in += data
                if not data or len(self._in) > self.most:
                    self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *lines, self._in = self._in.split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):  # not one of ours
                self.is_open = False
                break
            messages.append(message)
        return messages

    def close(self) -> None:
        self.is_open = False
        self.connection.close()


@dataclass(frozen=True)
class Address:
    """Where keepers find deepy.py, and what they prove themselves with."""

    host: str  # the name of deepy.py's host, whose keepers go through its loopback
    loopback: int  # a port there
    places: list[tuple[str, int]] = field(default_factory=list)  # for the other hosts
    key: str = ""

    def write(self, folder: Path) -> None:
        """Into the run's folder, for this user's eyes only."""
        handle = os.open(folder / _FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump([self.host, self.loopback, self.places, self.key], file)

    @classmethod
    def read(cls, folder: Path) -> Address:
        host, loopback, places, key = json.loads((folder / _FILE).read_text())
        return cls(host, loopback, [(str(name), int(port)) for name, port in places], key)


def proof(key: str, nonce: str, rank: int) -> str:
    return hmac.new(key.encode(), f"{nonce} {rank}".encode(), hashlib.sha256).hexdigest()


def listen(hosts: Iterable[str]) -> tuple[list[socket.socket], Address]:
    """Sockets for the keepers here and, on the addresses that lead to them, those on `hosts`."""
    here = socket.create_server(("127.0.0.1", 0), backlog=128)
    listeners, places = [here], []
    for address in sorted(_own_addresses(hosts)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError):
            listener = socket.create_server((address, 0), family=family, backlog=4096)
            listeners.append(listener)
            where = address or socket.gethostname()
            places.append((where, listener.getsockname()[1]))
    for listener in listeners:
        listener.setblocking(False)
    key = secrets.token_hex(32)
    return listeners, Address(socket.gethostname(), here.getsockname()[1], places, key)


def _own_addresses(hosts: Iterable[str]) -> set[str]:
    """Our addresses on the ways to `hosts`; "", all of them, for a host without a known address."""
    found = set()
    for host in hosts:
        if host in ("localhost", socket.gethostname()):
            continue
        try:
            family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                found.add(probe.getsockname()[0])
        except OSError:
            found.add("")
    found -= {"127.0.0.1", "::1"}
    return {""} if "" in found else found


def connect(address: Address, rank: int, pid: int, timeout: float = LEASE_S) -> Line:
    """A keeper's connection, proven. Raises OSError when none of the addresses answers."""
    places = list(address.places)
    if address.host == socket.gethostname():
        places.insert(0, ("127.0.0.1", address.loopback))
    deadline = time.monotonic() + timeout
    reason = OSError(f"{address.host} has no address that leads here")
    while True:
        for place in places:
            try:
                connection = socket.create_connection(place, timeout=5.0)
                return _introduce(connection, address.key, rank, pid)
            except (OSError, ValueError) as error:
                where = f"{place[0]}:{place[1]}"
                reason = OSError(f"{where}: {getattr(error, 'strerror', None) or error}")
        if time.monotonic() > deadline or not places:
            raise reason
        time.sleep(0.2)


def _introduce(connection: socket.socket, key: str, rank: int, pid: int) -> Line:
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        data = b""
        while not data.endswith(b"\n"):
            part = connection.recv(1024)
            if not part:
                raise OSError("it closed the connection")
            data += part
        answer = proof(key, str(json.loads(data)["nonce"]), rank)
        line = Line(connection)
        line.send(rank=rank, proof=answer, host=socket.gethostname(), pid=pid)
        stack.pop_all()
        return line
