"""A pool of gloo ranks that lives for the whole test session.

Importing torch, DeepSpeed and megatron-core costs seconds per process, so ranks are started once
and given one function after another. A function that hangs, dies or raises costs its own test only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
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

GRACE_S = 5.0  # what the other ranks get once one has failed; gloo tells them at once


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
        self._context = multiprocessing.get_context("forkserver")
        # Forked from one process that has torch loaded, a replaced rank costs milliseconds.
        self._context.set_forkserver_preload(["torch", "torch.distributed"])
        self._max_ranks = max_ranks
        self._ranks: dict[int, _Rank] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="neox-world-")
        self._calls = itertools.count()

    def run(self, n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call `fn(rank, *args)` on ranks 0..n-1 and return the n results in rank order.

        `fn` is a module-level function; torch.distributed (gloo) holds exactly n ranks meanwhile.
        The first exception is raised here with that rank's traceback as its cause. RankError when
        a rank dies, calls sys.exit, or is not done after `timeout` seconds; its stacks are shown.
        """
        assert 1 <= n <= self._max_ranks, f"{n} ranks asked for, the pool has {self._max_ranks}"
        call = pickle.dumps((fn, args))
        store = Path(self._folder.name) / f"store{next(self._calls)}"
        ranks = {rank: self._start(rank) for rank in range(n)}
        for rank, worker in ranks.items():
            job = (list(sys.path), call, rank, n, str(store), timeout)
            worker.connection.send_bytes(pickle.dumps(job))
        return self._collect(ranks, timeout)

    def _start(self, rank: int) -> _Rank:
        if rank in self._ranks and self._ranks[rank].process.is_alive():
            return self._ranks[rank]
        ours, theirs = self._context.Pipe()
        stacks = Path(self._folder.name) / f"stacks{rank}"
        process = self._context.Process(target=_serve, args=(theirs, str(stacks)), daemon=True)
        process.start()
        theirs.close()
        self._ranks[rank] = _Rank(process, ours, stacks)
        return self._ranks[rank]

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
        """Kill ranks; return what each was doing, or how it ended. The next call replaces them."""
        said = {}
        for rank, worker in ranks.items():
            if with_stacks:
                said[rank] = _ask_stacks(worker)
            worker.process.kill()
        for rank, worker in ranks.items():
            worker.process.join()
            worker.connection.close()
            said.setdefault(rank, f"exit code {worker.process.exitcode}")
            del self._ranks[rank]
        return said

    def close(self) -> None:
        """End every rank and remove the pool's files."""
        self._end(dict(self._ranks), with_stacks=False)
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


def _serve(connection: multiprocessing.connection.Connection, stacks: str) -> None:
    """A rank's whole life: take a job, run it, answer; until the session closes the pipe."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends the pool
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed warns that it had to guess
        environment = dict(os.environ)
        while True:
            try:
                job = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                answer = (False, _call(*job))
                message = pickle.dumps(answer)
            except BaseException as error:
                message = pickle.dumps((True, _portable(error)))
            connection.send_bytes(message)  # before the others see our sockets close
            _leave()
            os.environ.clear()
            os.environ.update(environment)


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


def _leave() -> None:
    """Undo what a test may have set up, in every library that keeps it in module globals."""
    import torch.distributed as dist

    forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
    # An engine holds process groups, each of which has threads that go on polling. Not every time:
    # it takes a tenth of a second to find them.
    tasks = Path("/proc/self/task")  # Linux
    if tasks.exists() and len(list(tasks.iterdir())) > 60:
        _let_engines_go()


def _let_engines_go() -> None:
    """DeepSpeed's hooks on parameters keep an engine alive, unseen by the garbage collector."""
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None:
        for found in gc.get_objects():
            if issubclass(type(found), engines.DeepSpeedEngine):
                with contextlib.suppress(Exception):  # it may not have been built whole
                    found.destroy()
    gc.collect()
