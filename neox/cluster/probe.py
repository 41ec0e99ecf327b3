"""Hosts from which no rank has reported yet: whether they are still there.

A rank that reports has a keeper, whose silence tells. Before that a host may vanish unnoticed, and
its launcher's connection say nothing for hours. So such hosts are asked, on the port of ssh.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from neox.cluster.control import LEASE_S

PORT = 22
_EVERY_S = 2.0  # between two questions
_PATIENCE_S = 3.0  # for an answer


@dataclass
class _Host:
    address: str | None  # None: its name is not known
    answered: float | None = None  # when it did last
    asked: float = float("-inf")
    probe: socket.socket | None = None


class Probe:
    """Which hosts have answered, and then have not for LEASE_S.

    One that never did is not judged: something may keep us from that port. Nothing here waits,
    but for names to be looked up, once each.
    """

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}

    def lost(self, hosts: Iterable[str], now: float) -> dict[str, str]:
        """Of `hosts`, those that are lost, with their addresses; call it a few times a second."""
        found = {}
        for name in hosts:
            host = self._hosts.get(name) or self._hosts.setdefault(name, _Host(address_of(name)))
            if host.address is None:
                continue
            _ask(host, now)
            if host.answered is not None and now - host.answered > LEASE_S:
                found[name] = host.address
        return found

    def close(self) -> None:
        for host in self._hosts.values():
            _forget(host)


def address_of(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, PORT, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _ask(host: _Host, now: float) -> None:
    if host.probe is None and now - host.asked > _EVERY_S:
        assert host.address is not None
        family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
        host.probe, host.asked = socket.socket(family), now
        host.probe.setblocking(False)
        code = host.probe.connect_ex((host.address, PORT))
        if code != errno.EINPROGRESS:
            _note(host, code, now)
    elif host.probe is not None:
        if select.select([], [host.probe], [], 0)[1]:
            _note(host, host.probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), now)
        elif now - host.asked > _PATIENCE_S:
            _forget(host)


def _note(host: _Host, code: int, now: float) -> None:
    """A refusal is an answer, too."""
    if code in (0, errno.ECONNREFUSED):
        host.answered = now
    _forget(host)


def _forget(host: _Host) -> None:
    if host.probe is not None:
        host.probe.close()
        host.probe = None
