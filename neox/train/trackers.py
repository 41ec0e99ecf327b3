"""Where metrics go besides the console: the only door to TensorBoard; W&B's is wandb_run.py.

Tracking serves the run and may never end it: a tracker that cannot be opened, or fails later, is
reported in one warning and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from neox import log
from neox.config import NeoXConfig
from neox.train.wandb_run import WandbRun


class Tracker(Protocol):
    """Something that keeps numbers by step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record `values` at `step`. Steps never fall; one step may be logged several times."""

    def flush(self) -> None:
        """Put on disk what was logged: from here a resumed run goes on."""

    def close(self, failed: bool = False) -> None:
        """Write out what is pending. `failed` says that the run ends with an error."""


class Trackers:
    """Several trackers as one, each kept from harming the run. A context manager."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def add(self, name: str, factory: Callable[[], Tracker]) -> None:
        """Open a tracker; `name` is what a warning calls it."""
        try:
            self._open[name] = factory()
        except Exception as error:
            log.warning(f"{name} is left out: {_first_line(error)}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def close(self, failed: bool = False) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self._open.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._open[name]
                log.warning(f"{name} failed, the run goes on without it: {_first_line(error)}")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def open_trackers(config: NeoXConfig, rank: int, iteration: int | None = None) -> Trackers:
    """The W&B and TensorBoard runs that `config` asks for; on every rank but 0 there are none.

    `iteration` is the one that training starts from: later points of an earlier run are dropped.
    """
    trackers = Trackers()
    if rank == 0:
        if config.tensorboard_dir:
            trackers.add("TensorBoard", lambda: TensorBoardTracker(config, iteration))
        if config.use_wandb:
            trackers.add("W&B", lambda: WandbRun(config, iteration))
    return trackers


class TensorBoardTracker:
    """Event files in `tensorboard_dir`; the first value of a key at a step is the one kept."""

    def __init__(self, config: NeoXConfig, iteration: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError("tensorboard_dir needs `pip install tensorboard`") from error
        first = None if iteration is None else iteration + 1
        self._writer = SummaryWriter(config.tensorboard_dir, purge_step=first)
        self._steps: dict[str, int] = {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            if self._steps.get(key) != step:
                self._steps[key] = step
                self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
