"""Ranks that never report: what is known of their hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from neox.cluster import probe
from neox.cluster.arrival import Arrival
from neox.cluster.control import LEASE_S
from neox.cluster.probe import Probe
from neox.cluster.ranks import Ranks
from neox.cluster.run_folder import NOISE, Job, RunFolder
from neox.cluster.stopping import ECHO_S, Requests

HOSTS = {"alpha.invalid": [0, 1], "beta.invalid": [0, 1]}


@pytest.fixture
def arrival(tmp_path: Path) -> Iterator[Arrival]:
    """Of four ranks on two hosts that nobody knows."""
    folder = RunFolder(tmp_path)
    folder.job = Job("train", None, "cpu", 4, "127.0.0.1", 29500, "here", hosts=HOSTS)
    ranks = Ranks(4)
    yield Arrival(folder, ranks, 100.0, several_hosts=True)
    ranks.close()


def test_pdshs_word_of_an_ssh_that_ended_names_the_host(arrival: Arrival) -> None:
    assert arrival.trouble(0.0) is None
    words = "Connection refused\npdsh@alpha: beta.invalid: ssh exited with exit code 255\n"
    (arrival.folder.path / NOISE).write_text(words)
    found = arrival.trouble(0.0)
    assert found is not None and found.launcher_tells and not found.lost
    reason = "ssh to beta.invalid ended with status 255, before ranks 2, 3 had started there"
    assert found.reason == reason


def test_ranks_that_are_late_are_told_after_the_watchdogs_time(arrival: Arrival) -> None:
    arrival.ranks.first = 50.0
    assert arrival.trouble(149.0) is None
    found = arrival.trouble(151.0)
    assert found is not None and found.reason.startswith("ranks 0, 1, 2, 3 did not start within")


def test_a_host_is_lost_that_has_answered_and_then_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(probe, "PORT", listener.getsockname()[1])
    asked = Probe()
    assert asked.lost(["127.0.0.1"], 0.0) == {}
    listener.accept()[0].close()
    assert asked.lost(["127.0.0.1"], 1.0) == {}  # the answer
    # A machine that is gone does not refuse either: its port takes nobody any more.
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, place: 110)
    assert asked.lost(["127.0.0.1"], LEASE_S) == {}
    assert asked.lost(["127.0.0.1"], LEASE_S + 2.0) == {"127.0.0.1": "127.0.0.1"}
    asked.close()
    listener.close()


def test_a_host_that_never_answered_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, place: 110)
    asked = Probe()
    for now in (0.0, 100.0, 200.0):
        assert asked.lost(["127.0.0.1"], now) == {}


def test_an_echo_of_a_signal_is_no_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = Requests()
    for number in (10, 10, 2, 2):
        stop.add(number)
    assert stop.numbers == [10, 2, 2]  # a second Ctrl-C is meant
    now[0] += ECHO_S
    stop.add(10)
    assert stop.numbers == [10, 2, 2, 10]
