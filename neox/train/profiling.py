"""The torch profiler over some iterations of a run: `profile`, `profile_step_start` and `_stop`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neox import log
from neox.config import NeoXConfig
from neox.parallel.groups import ProcessGroups


class Profiler:
    """Every rank writes its own trace: what a rank waits for is seen in the others'.

    Iterations profile_step_start up to, and without, profile_step_stop are in it, each under its
    number. A trace opens in https://ui.perfetto.dev, chrome://tracing, or TensorBoard's profiler.
    """

    def __init__(self, config: NeoXConfig, groups: ProcessGroups) -> None:
        self._steps = range(config.profile_step_start, config.profile_step_stop)
        if not config.profile:
            self._steps = range(0)
        self._rank = groups.rank
        self._folder = Path(config.tensorboard_dir or Path(config.log_dir or ".") / "profile")
        self._memory: Path | None = None
        if config.profile and config.memory_profiling:
            if groups.device.type == "cuda":
                self._memory = Path(config.memory_profiling_path or self._folder)
            else:
                log.warning("memory_profiling does nothing here: it records the memory of CUDA")
        self._running: Any = None
        self._first = 0

    @contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around a step."""
        if number not in self._steps:
            yield
            return
        if self._running is None:
            self._start(number)
        with torch.profiler.record_function(f"ProfilerStep#{number}"):
            yield
        if number + 1 not in self._steps:
            self._stop(number)

    def close(self, last: int) -> None:
        """The run ends after iteration `last`; a trace that has not come to its end is written."""
        if self._running is not None:
            self._stop(last)

    def _start(self, number: int) -> None:
        self._first = number
        self._running = torch.profiler.profile(
            record_shapes=True, profile_memory=True, with_flops=True
        )
        self._running.__enter__()
        if self._memory is not None:
            torch.cuda.memory._record_memory_history()

    def _stop(self, number: int) -> None:
        profile, self._running = self._running, None
        profile.__exit__(None, None, None)
        name = f"iterations{self._first}-{number}.rank{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"{name}.pt.trace.json"
            profile.export_chrome_trace(str(trace))
            log.info(f"profile of iterations {self._first} to {number}: {trace}")
            if self._memory is not None:
                self._memory.mkdir(parents=True, exist_ok=True)
                snapshot = self._memory / f"{name}.memory.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
                log.info(f"CUDA's memory meanwhile: {snapshot} (https://pytorch.org/memory_viz)")
        except OSError as error:
            log.warning(f"profile: the trace cannot be written: {error}")
