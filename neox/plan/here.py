"""The rates of this machine, measured in some seconds: for predictions of small trainings."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import torch

from neox.parallel.layers import linear
from neox.plan.cluster import HERE, Cluster, Link, Reached

ROUNDS = 7
ROWS, WIDTH = 512, 1024  # of the products: a small model's
COPIED = 64 * 2**20  # elements; larger than any cache
SENT = 2**24  # bytes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure() -> Cluster:
    """This machine's CPU as one device, which several ranks share.

    Messages between ranks go through sockets, as gloo's do. What is measured is what is reached,
    so nothing is taken off it.
    """
    link = Link(max(socket_rate() for _ in range(ROUNDS)), latency=1e-4)
    return Cluster(
        name=HERE,
        device=f"CPU, {torch.get_num_threads()} threads",
        memory=_memory(),
        peak={name: product_rate(dtype) for name, dtype in _DTYPES.items()},
        bandwidth=copy_rate(),
        devices_per_node=1,
        node=link,
        network=link,
        reached=Reached(),
        shared=True,
    )


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the product of a linear layer."""
    x, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(4 * WIDTH, WIDTH, dtype=dtype)
    return 2 * ROWS * WIDTH * 4 * WIDTH / _seconds(lambda: linear(x, weight))


def copy_rate() -> float:
    """Bytes/s of memory, read and written."""
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def socket_rate() -> float:
    """Bytes/s from one thread to another of this machine."""
    one, other = socket.socketpair()
    buffer = bytearray(SENT)

    def receive() -> None:
        view, got = memoryview(buffer), 0
        while got < SENT:
            got += other.recv_into(view[got:])

    thread = threading.Thread(target=receive)
    content = bytes(SENT)
    start = time.perf_counter()
    thread.start()
    one.sendall(content)
    thread.join()
    seconds = time.perf_counter() - start
    one.close()
    other.close()
    return SENT / seconds


def _seconds(run: Callable[[], object]) -> float:
    """The quickest of some rounds: others use the machine too."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _memory() -> float:
    """Bytes of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
