"""What a training run starts from: nothing, a checkpoint's weights, or a run to be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox import log
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import OptimizerFiles, optimizer_files
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups


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
    saved = optimizer_files(checkpoint.folder, checkpoint.tp)
    if saved is None:
        log.info(f"{checkpoint.folder} holds no ZeRO optimizer state: starting a fresh optimizer")
        return Start(iteration, checkpoint)
    wanted = OptimizerFiles(groups.tp, groups.pp, groups.dp, config.dtype == "bfloat16")
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
