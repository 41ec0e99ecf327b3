"""How long the parts of a step took: wall_clock_breakdown.

DeepSpeed's own timers fail in its pipeline. These wrap the calls that it makes anyway; on CUDA they
wait for the device at both ends, which costs some overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule

from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine

# Upstream's names. Without a pipeline: the methods of DeepSpeed's engine ...
_METHODS = {
    "forward": "forward",
    "backward": "backward",
    "backward-allreduce": "allreduce_gradients",
    "optimizer": "step",
}
# ... and with one DeepSpeed's names for the instructions of its schedule.
_INSTRUCTIONS = {
    schedule.LoadMicroBatch: "batch_input",
    schedule.ForwardPass: "fwd",
    schedule.BackwardPass: "bwd",
    schedule.ReduceTiedGrads: "bwd_allreduce",
    schedule.ReduceGrads: "bwd_allreduce",
    schedule.OptimizerStep: "step",
    schedule.SendActivation: "pipe_send_output",
    schedule.SendGrad: "pipe_send_grad",
    schedule.RecvActivation: "pipe_recv_input",
    schedule.RecvGrad: "pipe_recv_grad",
}


class StepTimers:
    """Seconds on this rank, by part. What ran between two steps, an evaluation, does not count."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._seconds: dict[str, float] = {}
        self._on_cuda = engine.groups.device.type == "cuda"
        self._is_pipelined = engine.is_pipelined
        inner = engine.inner
        if engine.is_pipelined:
            inner._INSTRUCTION_MAP = {
                kind: self._timed(_INSTRUCTIONS[kind], run) if kind in _INSTRUCTIONS else run
                for kind, run in inner._INSTRUCTION_MAP.items()
            }
            inner.train_batch = self._timed("train_batch", inner.train_batch)
        else:
            for name, method in _METHODS.items():
                setattr(inner, method, self._timed(name, getattr(inner, method)))

    def drawn(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; a pipeline's are timed where it asks for them."""
        if self._is_pipelined:
            yield from batches
        while True:
            with self._measured("batch generator"):
                batch = next(batches)
            yield batch

    def start(self) -> None:
        self._seconds.clear()

    def read(self) -> dict[str, float]:
        seconds = dict(self._seconds)
        if self._is_pipelined:
            return seconds
        reduction = seconds.get("backward-allreduce", 0.0)
        return {
            "forward": seconds["forward"],
            "backward": seconds["backward"],
            "backward-backward": seconds["backward"] - reduction,
            "backward-allreduce": reduction,
            "optimizer": seconds["optimizer"],
            "batch generator": seconds["batch generator"],
        }

    def _timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._measured(name):
                return run(*args, **kwargs)

        return timed

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
