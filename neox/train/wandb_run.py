"""The only door to W&B: one run, online or offline, that stays one when training is resumed.

W&B cannot take back what it was told. A run that is killed has told it of steps after its last
checkpoint, which are then done again; and an offline run cannot be continued at all, every process
writes a file of its own. So a journal of ours (neox.train.journal) holds what the run logged, and a
resumed run tells it anew: offline into a new file, which replaces the old one, and online as far as
the server has not got it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox import log
from neox.atomic import write_text
from neox.config import NeoXConfig
from neox.train.journal import Journal, Row

_ID_FILE = "wandb_run.json"  # in the folder that a run saves its checkpoints to


class WandbRun:
    """One W&B run: online with an API key, else offline (`wandb sync` uploads it later).

    Project, group, name and entity are the configuration's, verbatim. W&B's own environment
    variables (WANDB_MODE, WANDB_DIR, WANDB_RUN_ID, WANDB_API_KEY ...) keep their meaning. Files are
    kept in `{log_dir}/wandb`, or `./wandb` without a log_dir.

    `iteration` is the one that training starts from; None: not training, a run of its own.
    """

    def __init__(self, config: NeoXConfig, iteration: int | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds to wait for its server
        if config.origin("wandb_host") != "default":
            os.environ["WANDB_BASE_URL"] = config.wandb_host
        import wandb

        self._wandb = wandb
        self._config = config
        self._folder = Path(os.environ.get("WANDB_DIR") or config.log_dir or ".")
        self._folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            log.info("W&B has no API key here: the run is kept offline, `wandb sync` uploads it")
        self._id = None if iteration is None else self._run_id(iteration)
        try:
            self._run = self._start(mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning(f"W&B cannot be reached, the run is kept offline: {reason}")
            self._run = self._start("offline")
        self._known = self._run.step  # the server has all steps before this one
        self._journal = None if iteration is None else self._replay(iteration)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._journal is not None:
            self._journal.log(values, step)
        if step >= self._known:
            self._run.log(dict(values), step=step)

    def flush(self) -> None:
        if self._journal is not None:
            self._journal.flush()

    def close(self, failed: bool = False) -> None:
        if self._journal is not None:
            self._journal.close()
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown()  # waits until its service has written everything

    def _run_id(self, iteration: int) -> str:
        """The run's own id: known again where it goes on from its checkpoints.

        A run that was killed before its first checkpoint starts over, and is the same run if it is
        configured the same. Everything else that begins is a new run, also in the same folder.
        """
        config = self._config
        given = os.environ.get("WANDB_RUN_ID")
        if config.save is None:
            return given or secrets.token_hex(4)
        path = Path(config.save) / _ID_FILE
        digest = hashlib.sha256(json.dumps(_values(config), sort_keys=True).encode()).hexdigest()
        stored: dict[str, str] = {}
        if path.exists() and config.load is not None:
            stored = json.loads(path.read_text())
            goes_on = iteration > 0 and Path(config.load).resolve() == path.parent.resolve()
            if not goes_on and stored["config"] != digest:
                stored = {}
        run_id = given or stored.get("id") or secrets.token_hex(4)
        write_text(path, json.dumps({"id": run_id, "config": digest}) + "\n")
        return run_id

    def _start(self, mode: str) -> Any:
        config = self._config
        return self._wandb.init(
            project=config.wandb_project,
            group=config.wandb_group,
            name=config.wandb_run_name,
            entity=config.wandb_team,
            id=self._id,
            resume="allow" if self._id and mode == "online" else None,
            dir=self._folder,
            config=_values(config),
            mode=mode,
            # At most a second of metrics is lost with a killed process; the default is 15.
            settings=self._wandb.Settings(x_transaction_log_flush_interval=1.0),
        )

    def _replay(self, iteration: int) -> Journal:
        """Tell W&B what it lacks of the steps up to `iteration`; the journal of those to come."""
        path = self._folder / "wandb" / f"{self._id}.jsonl"
        is_continued = path.exists()
        journal = Journal(path, iteration, replaces=True)
        with log.progress(total=iteration, desc="W&B: earlier iterations") as bar:
            for row in journal.rows():
                if (row["iteration"] or 0) >= self._known:
                    self._tell(row)
                bar.update(1)
        if is_continued and self._run.offline:
            # Found by their files: the folder of a second run in one second has a name in `-1`.
            own = Path(self._run.dir).resolve().parent
            name = glob.escape(f"run-{self._id}.wandb")
            for file in (self._folder / "wandb").glob(f"offline-run-*/{name}"):
                if file.parent.resolve() != own:
                    file.unlink()
                    # The service of a run that was just killed may still be writing its notes here.
                    shutil.rmtree(file.parent, ignore_errors=True)
        return journal

    def _tell(self, row: Row) -> None:
        values = {key: math.nan if value is None else value for key, value in row.items()}
        step, at = int(values.pop("iteration")), values.pop("time")
        self._run.log({**values, "_timestamp": at}, step=step)


def _values(config: NeoXConfig) -> dict[str, Any]:
    values = json.loads(config.encode())
    del values["origins"]
    return values
