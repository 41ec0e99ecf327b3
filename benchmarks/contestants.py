"""Contestants of a benchmark: each in a process of its own, taking timed turns.

A process of its own, so that neither another's settings nor its memory count; turns, one of each
per round, so that what else the machine does falls on all.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from neox import log

THREADS = 2

Turn = Callable[[Any], Any]  # from what is asked, which is never None, to the answer
Build = Callable[[], Turn]  # for its own process: what it imports is imported there


class Contestants:
    """Processes that have built what competes, by name; every answer is waited for.

    A contestant whose process fails has printed why, and ends the benchmark.
    """

    def __init__(self, builds: Mapping[str, Build]) -> None:
        """Start them all at once and return when all are ready; `builds` can be pickled."""
        os.environ["OMP_NUM_THREADS"] = str(THREADS)
        context = multiprocessing.get_context("spawn")
        self.names = list(builds)
        self._orders: dict[str, Connection] = {}
        self._processes = []
        for name, build in builds.items():
            self._orders[name], end = context.Pipe()
            process = context.Process(target=_work, args=(build, end), daemon=True)
            process.start()
            self._processes.append(process)
            end.close()
        for name in self.names:
            self._answer(name)

    def round(self, number: int, order: Any) -> dict[str, tuple[float, Any]]:
        """(seconds, answer) of one turn each; the last of a round is the first of the next."""
        turns = {}
        for name in self.names if number % 2 else reversed(self.names):
            self._orders[name].send(order)
            turns[name] = self._answer(name)
        return {name: turns[name] for name in self.names}

    def end(self) -> dict[str, int]:
        """End the processes; the peak resident memory of each, in bytes."""
        memory = {}
        for name, connection in self._orders.items():
            connection.send(None)
            memory[name] = self._answer(name)
        for process in self._processes:
            process.join()
        return memory

    def _answer(self, name: str) -> Any:
        try:
            return self._orders[name].recv()
        except EOFError:
            sys.exit(f"{name} failed; its error is above")


def _work(build: Build, orders: Connection) -> None:
    """A contestant's process."""
    log.quiet_third_parties()
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for others, and say so
    torch.set_num_threads(THREADS)
    turn = build()
    orders.send("ready")
    while (order := orders.recv()) is not None:
        started = time.perf_counter()
        answer = turn(order)
        orders.send((time.perf_counter() - started, answer))
    orders.send(peak_memory())


def peak_memory() -> int:
    """Bytes of this process's peak resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
