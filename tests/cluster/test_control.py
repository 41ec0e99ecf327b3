"""Who may speak to deepy.py, and that a line of messages waits for nobody."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from neox.cluster.control import STRANGERS_BYTES, Address, Line, connect, listen
from neox.cluster.ranks import Ranks
from neox.cluster.run_folder import End


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(2)
    yield made
    made.close()


def join(ranks: Ranks, address: Address, rank: int, pid: int) -> Line:
    """A keeper's connection, made while `ranks` listens."""
    with ThreadPoolExecutor(1) as pool:
        line = pool.submit(connect, address, rank, pid)
        while not line.done():
            ranks.look(0.01)
        return line.result()


def look_until(ranks: Ranks, line: Line | None = None, known: int = 0) -> None:
    """Until so many ranks are known, or `line` is closed by the other end."""
    deadline = time.monotonic() + 20
    while len(ranks.known) < known or (line is not None and line.is_open):
        assert time.monotonic() < deadline
        ranks.look(0.01)
        if line is not None:
            line.receive()


def test_a_rank_that_proves_itself_is_heard(ranks: Ranks) -> None:
    line = join(ranks, ranks.address, 1, 4711)
    look_until(ranks, known=1)
    rank = ranks.known[1]
    assert (rank.pid, rank.host) == (4711, socket.gethostname())
    line.send(end={"status": 2, "error": True, "message": "no data"})
    line.send(code=2)
    line.close()
    look_until(ranks, rank.line)
    assert (rank.end, rank.code) == (End(2, error=True, message="no data"), 2)
    assert rank.trouble(time.monotonic()) == "error"


def test_strangers_are_turned_away(ranks: Ranks) -> None:
    wrong = replace(ranks.address, key="0" * 64)
    look_until(ranks, join(ranks, wrong, 0, 1))
    look_until(ranks, join(ranks, ranks.address, 2, 1))  # there is no rank 2
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"rank": 0}\n', b"x" * STRANGERS_BYTES * 2):
        connection = socket.create_connection(("127.0.0.1", ranks.address.loopback))
        connection.sendall(words)
        look_until(ranks, Line(connection))
    assert ranks.known == {}


def test_nobody_takes_a_ranks_place(ranks: Ranks) -> None:
    first = join(ranks, ranks.address, 0, 1)
    look_until(ranks, known=1)
    look_until(ranks, join(ranks, ranks.address, 0, 2))
    assert ranks.known[0].pid == 1 and ranks.known[0].line.is_open
    first.close()
    look_until(ranks, ranks.known[0].line)
    assert ranks.known[0].trouble(time.monotonic()) == "gone"


def test_an_order_reaches_those_that_come_later(ranks: Ranks) -> None:
    ranks.order(kill=1)
    line = join(ranks, ranks.address, 0, 1)
    look_until(ranks, known=1)
    messages: list[dict] = []
    while {"kill": 1} not in messages:
        messages += line.receive()
        ranks.look(0.01)


def test_a_line_does_not_wait_for_who_does_not_listen() -> None:
    one, other = socket.socketpair()
    line = Line(one, most=1 << 16)
    started = time.monotonic()
    for _ in range(200):
        line.send(text="x" * 4096)
    assert time.monotonic() - started < 5 and line.is_open
    other.close()
    line.send(text="x")
    assert not line.is_open


def test_the_key_is_for_the_users_eyes_only(tmp_path: Path) -> None:
    listeners, address = listen([])
    before = os.umask(0)
    try:
        address.write(tmp_path)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Address.read(tmp_path) == address
    for listener in listeners:
        listener.close()
