"""`restarts`: a training run that fails goes on from its newest whole checkpoint by itself."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from neox import log
from neox.cluster.control import LEASE_S
from neox.cluster.supervise import Outcome
from neox.config import NeoXConfig

RETURN_S = 600.0  # for lost hosts to answer again
_PROBE_PORT, _PROBE_S = 22, 3.0
_WANDB_RUN = "wandb_run.json"  # neox.train.wandb_run keeps the run's id there

Attempt = Callable[[NeoXConfig, Mapping[str, str]], Outcome]


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a run has put into `save`, as far as it tells a change from none."""

    latest: tuple[str, int] | None
    wandb: tuple[str, int] | None

    @classmethod
    def look(cls, config: NeoXConfig) -> _Saved:
        folder = Path(config.save or "")
        return cls(_version(folder / "latest"), _version(folder / _WANDB_RUN))


def run(config: NeoXConfig, attempt: Attempt, restarts: int) -> int:
    """Make up to 1 + `restarts` attempts; the exit status of the last.

    `attempt` gets the configuration and what to add to the environment. What the user did wrong or
    asked for is not tried again, nor what failed twice at one iteration with nothing saved between.
    """
    at_start = _Saved.look(config)
    resumed, environment = config, dict[str, str]()
    earlier: tuple[int, int] | None = None
    for number in range(1, restarts + 2):
        before = _Saved.look(config)
        outcome = attempt(resumed, environment)
        if outcome.status == 0 or not outcome.may_pass or number > restarts:
            return outcome.status
        now = _Saved.look(config)
        failure = (outcome.iteration, outcome.status) if outcome.repeats else None
        if failure is not None and failure == earlier and now.latest == before.latest:
            where = f"in iteration {failure[0]}" if failure[0] else "before the first iteration"
            print(
                f"error: it failed {where} twice, with no checkpoint saved between: it would fail "
                "there again, and is not restarted",
                file=sys.stderr,
            )
            return outcome.status
        earlier = failure
        if outcome.lost and not _wait_for(outcome.lost):
            return outcome.status
        if now.latest is not None and now.latest != at_start.latest:
            resumed = _going_on(config)
        if now.wandb is not None and now.wandb != at_start.wandb:
            environment["WANDB_RUN_ID"] = json.loads(now.wandb[0])["id"]
        log.info(f"restart {number} of {restarts}, {_whence(resumed, now)}: {outcome.reason}")
    raise AssertionError("the last attempt returns")


def _going_on(config: NeoXConfig) -> NeoXConfig:
    """The configuration that resumes what this run has saved, whatever it started from.

    The newest whole checkpoint is looked for, and verified, by the ranks (neox.train.start).
    """
    if config.lora is not None:  # `load` is the model; its own adapters are found in `save`
        return dataclasses.replace(config, no_load_optim=False)
    return dataclasses.replace(
        config, load=config.save, finetune=False, iteration=None, no_load_optim=False
    )


def _whence(config: NeoXConfig, saved: _Saved) -> str:
    own = config.save is not None and (config.load == config.save or config.lora is not None)
    if own and saved.latest is not None:
        return f"from {saved.latest[0].strip()}"
    return "from where it began"


def _version(path: Path) -> tuple[str, int] | None:
    try:
        return path.read_text(errors="replace"), path.stat().st_mtime_ns
    except OSError:
        return None


def _wait_for(hosts: Mapping[str, str]) -> bool:
    """Wait until lost hosts (name -> address) answer again; False when they do not."""
    names = ", ".join(hosts)
    log.info(f"waiting up to {RETURN_S / 60:.0f} minutes for {names} to answer again")
    begun = time.monotonic()
    # What runs on a host that was cut off ends itself when it has heard nothing for that long.
    earliest = begun + LEASE_S / 2
    told = begun
    while time.monotonic() < begun + RETURN_S:
        waiting = [name for name, address in hosts.items() if not _answers(address)]
        if not waiting and time.monotonic() > earliest:
            return True
        if waiting and time.monotonic() > told + 60:
            told = time.monotonic()
            log.info(f"still waiting for {', '.join(waiting)}, {(told - begun) / 60:.0f} minutes")
        time.sleep(1.0)
    print(f"error: {names} did not answer again: not restarted", file=sys.stderr)
    return False


def _answers(address: str) -> bool:
    """Whether anything does, be it that nobody listens there."""
    try:
        socket.create_connection((address, _PROBE_PORT), _PROBE_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
