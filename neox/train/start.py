"""What a training run starts from: nothing, a checkpoint's weights, or a run to be resumed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from neox import log
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


@dataclass(frozen=True)
class Start:
    """Steps already done, where the weights come from, and whether optimizer state comes too."""

    iteration: int = 0
    checkpoint: Checkpoint | None = None
    with_optimizer: bool = False


def find_start(config: NeoXConfig, groups: ProcessGroups) -> Start:
    """Decide from `load`, `iteration`, `finetune` and what the checkpoint holds; say it in a line.

    Raises CheckpointError. Not collective: every rank sees the same files and decides the same.
    """
    if config.load is None:
        return Start()
    directory = Path(config.load)
    if config.iteration is None and _is_own(config) and not _holds_checkpoints(directory):
        log.info(f"load: no checkpoint in {directory} yet, starting from fresh weights")
        return Start()
    checkpoint = Checkpoint.open(directory, config.iteration)
    if config.finetune:
        log.info(f"finetune: weights of {checkpoint.folder}, fresh optimizer, iteration 0")
        return Start(0, checkpoint)
    iteration = checkpoint.iteration
    if config.no_load_optim:
        log.info(f"resuming {checkpoint.folder} without its optimizer state (no_load_optim)")
        return Start(iteration, checkpoint)
    saved = _saved_optimizer(checkpoint)
    if saved is None:
        log.info(f"{checkpoint.folder} holds no ZeRO optimizer state: starting a fresh optimizer")
        return Start(iteration, checkpoint)
    wanted = _Optimizer(groups.tp, groups.pp, groups.dp, config.dtype == "bfloat16")
    if saved != wanted:
        raise CheckpointError(
            f"{checkpoint.folder}: its optimizer state was saved at {saved}, and this run is "
            f"{wanted}. Run as it was saved, or set no_load_optim: true to keep the weights "
            "and the iteration and start a fresh optimizer."
        )
    log.info(f"resuming {checkpoint.folder} at iteration {iteration}")
    return Start(iteration, checkpoint, with_optimizer=True)


def _holds_checkpoints(directory: Path) -> bool:
    return (directory / "latest").exists() or any(directory.glob("global_step*"))


def _is_own(config: NeoXConfig) -> bool:
    """Whether `load` is the folder that this run saves to, which its first run finds empty."""
    return (
        config.save is not None and Path(config.load or "").resolve() == Path(config.save).resolve()
    )


class _Optimizer(NamedTuple):
    """What optimizer files depend on: the grid, and whether the weights are bfloat16."""

    tp: int
    pp: int
    dp: int
    is_bf16: bool

    def __str__(self) -> str:
        grid = f"tp {self.tp} x pp {self.pp} x dp {self.dp}"
        return f"{grid} in bfloat16" if self.is_bf16 else grid


def _saved_optimizer(checkpoint: Checkpoint) -> _Optimizer | None:
    """By the names of the optimizer files; None where there are none. CheckpointError for gaps."""
    names = {path.name for path in checkpoint.folder.iterdir()}
    found = [match for name in names if (match := _OPTIMIZER_FILE.match(name))]
    if not found:
        return None
    prefix = found[0][1] or ""
    dp, parts = (1 + max(int(match[axis]) for match in found) for axis in (2, 3))
    needed = {f"mp_rank_{part:02d}_model_states.pt" for part in range(parts)} | {
        f"{prefix}zero_pp_rank_{replica}_mp_rank_{part:02d}_optim_states.pt"
        for replica in range(dp)
        for part in range(parts)
    }
    if missing := sorted(needed - names):
        raise CheckpointError(
            f"{checkpoint.folder} is incomplete: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''} {'is' if len(missing) == 1 else 'are'} missing. "
            "Set no_load_optim: true to keep the weights and the iteration and start a fresh "
            "optimizer."
        )
    return _Optimizer(checkpoint.tp, parts // checkpoint.tp, dp, bool(prefix))
