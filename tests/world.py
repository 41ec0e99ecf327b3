"""Gloo ranks for tests: processes forked, for each call, from one that has the libraries loaded.

Importing torch, DeepSpeed and megatron-core costs seconds per process, forking a process that has
imported them (tests/preloaded.py) some milliseconds. So no rank inherits what an earlier test left
in libraries' module globals, in threads or in memory, and one that hangs, dies or raises costs its
own test only.
"""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

GRACE_S = 0.5  # once one rank has failed, for another that died of it or before it
PRELOADED = "tests.preloaded"


class RankError(RuntimeError):
    """A rank hung, died or left; also the cause of an exception re-raised from a rank."""


@dataclass
class _Rank:
    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection
    stacks: Path  # where the process writes its Python stacks on SIGUSR1


class World:
    """Runs a function on n ranks at once; see `run`."""

    def __init__(self, max_ranks: int = 4) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([PRELOADED])
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Without the first, DeepSpeed warns of a guess; the second leads to what is preloaded.
        with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=os.pathsep.join(path)):
            multiprocessing.forkserver.ensure_running()
        self._max_ranks = max_ranks
        self._folder = tempfile.TemporaryDirectory(prefix="neox-world-")
        self._calls = itertools.count()

    def run(self, n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call `fn(rank, *args)` on ranks 0..n-1 and return the n results in rank order.

        `fn` is a module-level function; torch.distributed (gloo) holds exactly n ranks meanwhile.
        The first exception is raised here with that rank's traceback as its cause. RankError when
        a rank dies, calls sys.exit, or is not done after `timeout` seconds; its stacks are shown.
        """
        assert 1 <= n <= self._max_ranks, f"{n} ranks asked for, the limit is {self._max_ranks}"
        call = pickle.dumps((fn, args))
        folder = Path(self._folder.name) / f"call{next(self._calls)}"
        folder.mkdir()
        ranks = {rank: self._start(rank, n, call, folder, timeout) for rank in range(n)}
        try:
            return self._collect(ranks, timeout)
        finally:
            self._end(ranks, with_stacks=False)

    def _start(self, rank: int, n: int, call: bytes, folder: Path, timeout: float) -> _Rank:
        ours, theirs = self.context.Pipe()
        stacks = folder / f"stacks{rank}"
        job = (list(sys.path), call, rank, n, str(folder / "store"), timeout)
        process = self.context.Process(target=_serve, args=(theirs, str(stacks), job), daemon=True)
        process.start()
        theirs.close()
        return _Rank(process, ours, stacks)

    def _collect(self, ranks: dict[int, _Rank], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        raised: list[tuple[int, BaseException | None, str]] = []  # in order of time
        died: list[int] = []
        pending = dict(ranks)
        deadline = time.monotonic() + timeout
        while pending:
            by_connection = {worker.connection: rank for rank, worker in pending.items()}
            left = max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait(list(by_connection), left)
            if not ready:
                break
            for connection in ready:
                rank = by_connection[connection]
                del pending[rank]
                try:
                    failed, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    died.append(rank)
                else:
                    if failed:
                        raised.append((rank, *answer))
                    else:
                        results[rank] = answer
            if raised or died:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        hung = self._end(pending, with_stacks=not (raised or died))
        if died:
            codes = self._end({rank: ranks[rank] for rank in died}, with_stacks=False)
            raise RankError("; ".join(f"rank {rank} died: {codes[rank]}" for rank in died))
        if raised:
            rank, error, text = raised[0]
            cause = RankError(f"on rank {rank} of {len(ranks)}:\n{text}")
            if error is None:
                raise cause
            raise error from cause
        if hung:
            who = f"rank {', '.join(map(str, hung))} of {len(ranks)}"
            stacks = "\n".join(f"rank {rank}:\n{text}" for rank, text in hung.items())
            raise RankError(f"not done after {timeout:g} s: {who}\n{stacks}")
        return [results[rank] for rank in ranks]

    def _end(self, ranks: dict[int, _Rank], *, with_stacks: bool) -> dict[int, str]:
        """Kill ranks; return what each was doing, or how it ended."""
        said = {}
        for rank, worker in ranks.items():
            if with_stacks:
                said[rank] = _ask_stacks(worker)
            worker.process.kill()
        for rank, worker in ranks.items():
            worker.process.join()
            worker.connection.close()
            said.setdefault(rank, f"exit code {worker.process.exitcode}")
        return said

    def close(self) -> None:
        """Remove the files of all calls."""
        self._folder.cleanup()


def _ask_stacks(worker: _Rank) -> str:
    os.kill(worker.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    text = ""
    while time.monotonic() < deadline:
        before, text = text, worker.stacks.read_text()
        if text and text == before:
            return text
        time.sleep(0.05)
    return text or "(no answer: the process is stopped)"


def _serve(
    connection: multiprocessing.connection.Connection, stacks: str, job: tuple[Any, ...]
) -> None:
    """A rank's whole life: do the job, answer, and wait to be ended.

    It waits, because peers that still communicate would see its sockets close.
    """
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends us
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            message = pickle.dumps((False, _call(*job)))
        except BaseException as error:
            message = pickle.dumps((True, _portable(error)))
        connection.send_bytes(message)
        connection.poll(None)  # until the other end is closed
        os._exit(0)


def _call(path: list[str], call: bytes, rank: int, n: int, store: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    sys.path[:] = path
    fn, args = pickle.loads(call)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, n),
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=timeout),
    )
    torch.manual_seed(0)
    return fn(rank, *args)


def _portable(error: BaseException) -> tuple[BaseException | None, str]:
    """The exception if it survives pickling (sys.exit and the like do not count), and its text."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception):
        return None, text
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        return None, text
    return error, text


def forget_groups() -> None:
    """Undo what an engine left in the module globals of libraries, so that another may follow."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state.destroy_model_parallel()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        importlib.reload(groups)  # it caches process groups in module globals
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None:
        comm.cdb = None
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:  # ZeRO 3 numbers what it partitions, and ranks compare the numbers
        offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        offload.Init.param_id = 0
