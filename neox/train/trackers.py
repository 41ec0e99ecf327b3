"""Where metrics go besides the console: the only door to W&B and TensorBoard.

Tracking serves the run and may never end it: a tracker that cannot be opened, or fails later, is
reported in one warning and left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from neox import log
from neox.config import NeoXConfig


class Tracker(Protocol):
    """Something that keeps numbers by step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record `values` at `step`. Steps never fall; one step may be logged several times."""

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
            trackers.add("W&B", lambda: WandbTracker(config))
    return trackers


class TensorBoardTracker:
    """Event files in `tensorboard_dir`."""

    def __init__(self, config: NeoXConfig, iteration: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError("tensorboard_dir needs `pip install tensorboard`") from error
        first = None if iteration is None else iteration + 1
        self._writer = SummaryWriter(config.tensorboard_dir, purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WandbTracker:
    """One W&B run: online with an API key, else offline (`wandb sync` uploads it later).

    Project, group, name and entity are the configuration's, verbatim. W&B's own environment
    variables (WANDB_MODE, WANDB_DIR, WANDB_API_KEY ...) keep their meaning. Files are kept in
    `{log_dir}/wandb`, or `./wandb` without a log_dir.
    """

    def __init__(self, config: NeoXConfig) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds to wait for its server
        if config.origin("wandb_host") != "default":
            os.environ["WANDB_BASE_URL"] = config.wandb_host
        import wandb

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            log.info("W&B has no API key here: the run is kept offline, `wandb sync` uploads it")

        try:
            self._run = self._start(config, mode)
        except Exception as error:
            if mode != "online":
                raise
            log.warning(f"W&B cannot be reached, the run is kept offline: {_first_line(error)}")
            self._run = self._start(config, "offline")

    def _start(self, config: NeoXConfig, mode: str) -> Any:
        folder = Path(os.environ.get("WANDB_DIR") or config.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        values = json.loads(config.encode())
        del values["origins"]
        return self._wandb.init(
            project=config.wandb_project,
            group=config.wandb_group,
            name=config.wandb_run_name,
            entity=config.wandb_team,
            dir=folder,
            config=values,
            mode=mode,
            # At most a second of metrics is lost with a killed process; the default is 15.
            settings=self._wandb.Settings(x_transaction_log_flush_interval=1.0),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown()  # waits until its service has written everything


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
