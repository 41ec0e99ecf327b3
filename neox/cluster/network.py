"""The interface by which this host talks to others."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable

_SIOCGIFADDR = 0x8915  # Linux's request for an interface's IPv4 address, linux/sockios.h


def interface_towards(hosts: Iterable[str]) -> str | None:
    """The name of the interface that leads to the first of `hosts` that is not this one.

    None where no name resolves or nothing leads there; then libraries choose by themselves.
    """
    for host in hosts:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # of UDP: it chooses a route and sends nothing
                own = probe.getsockname()[0]
        except OSError:
            continue
        if not own.startswith("127."):
            return _interface_of(own)
    return None


def _interface_of(address: str) -> str | None:
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return None
