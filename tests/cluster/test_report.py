"""Whom a report blames for a hang, and how it tells what the others wait in."""

from __future__ import annotations

import socket
from typing import Any

from neox.cluster.control import Line
from neox.cluster.ranks import Rank
from neox.cluster.report import explain_status, human_bytes, listed, suspects, waiting


def rank(who: int, **state: Any) -> Rank:
    one, other = socket.socketpair()
    other.close()
    line = Line(one)
    known = {"iteration": 7, "doing": "", "call": "", "number": 0, "size": 0, "since": 0.0}
    return Rank(who, "alpha", 100 + who, line, 0.0, {**known, "waiting": False, **state})


def test_ranks_that_wait_in_one_collective_are_one_line() -> None:
    call = {"call": "all_reduce of tp", "number": 5123, "size": 2_100_000, "waiting": True}
    lines = waiting([rank(0, **call, since=34.2), rank(1, **call, since=33.0), rank(3, **call)])
    assert lines == ["  ranks 0, 1, 3 wait in all_reduce of tp (2.1 MB), call 5,123, since 34 s"]
    lines = waiting([rank(2, call="barrier of all ranks", number=3, since=2.0)])
    assert lines == ["  rank 2: in iteration 7, after barrier of all ranks, call 3, since 2 s"]


def test_who_waits_for_nobody_is_blamed() -> None:
    there = {"call": "all_reduce of dp", "number": 9, "waiting": True}
    away = rank(1, call="all_reduce of dp", number=8)
    assert suspects([rank(0, **there), away, rank(2, **there)]) == [away]


def test_who_is_behind_its_group_is_blamed() -> None:
    there = {"call": "all_reduce of dp", "number": 9, "waiting": True}
    behind = rank(1, call="broadcast of dp", number=8, waiting=True)
    other = rank(2, call="all_reduce of tp", number=2, waiting=True)
    assert suspects([rank(0, **there), behind, other]) == [behind]
    same = [rank(0, **there), rank(1, **there)]
    assert suspects(same) == same


def test_words_for_numbers() -> None:
    assert (listed([3]), listed({2, 0})) == ("rank 3", "ranks 0, 2")
    assert [human_bytes(n) for n in (768, 4100, 2e9)] == ["768 bytes", "4.1 kB", "2.0 GB"]
    assert explain_status(-11) == (139, "was killed by signal 11 (SIGSEGV)")
    assert explain_status(247)[0] == 137  # as DeepSpeed passes on signal 9
    assert explain_status(0) == (1, "ended with status 0, without saying why")
