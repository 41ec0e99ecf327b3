"""The training loop, whole: rate, step, log, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from neox.checkpoint.directory import keep_last, write_checkpoint
from neox.checkpoint.manifest import HAS_MANIFEST
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.data.loaders import Batch, Loaders
from neox.engine.base import Engine
from neox.parallel.groups import ProcessGroups
from neox.train.cadence import is_save_iteration
from neox.train.metrics import RunLog, StepResult
from neox.train.schedule import rate_reported, rate_used


def train(
    config: NeoXConfig,
    groups: ProcessGroups,
    engine: Engine,
    loaders: Loaders,
    run: RunLog,
    iteration: int,
    padded_vocab_size: int,
) -> int:
    """Train from `iteration` finished steps to `train_iters`; return the steps then finished.

    Collective over the world.
    """
    assert config.train_iters is not None and loaders.train is not None, "checked before"
    if iteration == 0 and is_save_iteration(config, 0):
        save(config, groups, engine, run, 0, padded_vocab_size)
    while iteration < config.train_iters:
        iteration += 1
        started = time.perf_counter()
        step = engine.train_batch(loaders.train, iteration, rate_used(config, iteration))
        run.train_step(
            iteration,
            StepResult(
                loss=step.loss,
                learning_rate=rate_reported(config, iteration),
                grad_norm=step.grad_norm,
                skipped=step.skipped,
                loss_scale=step.loss_scale,
                seconds=time.perf_counter() - started,
            ),
        )
        if loaders.valid is not None and iteration % config.eval_interval == 0:
            run.evaluation("validation", iteration, evaluate(config, engine, loaders.valid))
        if is_save_iteration(config, iteration):
            save(config, groups, engine, run, iteration, padded_vocab_size)
        if config.exit_interval and iteration % config.exit_interval == 0:
            break
    return iteration


def evaluate(config: NeoXConfig, engine: Engine, batches: Iterator[Batch]) -> dict[str, float]:
    """Mean loss and perplexity over `eval_iters` global batches. Collective over the world."""
    losses = [engine.eval_batch(batches) for _ in range(config.eval_iters)]
    loss = sum(losses) / len(losses)
    # Upstream caps the exponent at 20, so that a diverged model's perplexity stays a number.
    return {"lm_loss": loss, "lm_loss_ppl": math.exp(min(20.0, loss))}


def save(
    config: NeoXConfig,
    groups: ProcessGroups,
    engine: Engine,
    run: RunLog,
    iteration: int,
    padded_vocab_size: int,
) -> None:
    """Write a checkpoint and prune old ones. Collective over the world. CheckpointError."""
    assert config.save is not None
    directory = Path(config.save)
    state = {
        "iteration": iteration,
        "optimizer_type": config.optimizer_type,
        HAS_MANIFEST: True,
    }
    folder = write_checkpoint(
        directory,
        iteration,
        lambda aside: engine.save(aside, state),
        config.config_files or {},
        groups,
        grid={"tp": groups.tp, "pp": groups.pp, "dp": groups.dp},
        padded_vocab_size=padded_vocab_size,
        architecture=architecture(config),
    )
    if config.keep_last_n_checkpoints:
        keep_last(directory, config.keep_last_n_checkpoints, groups)
    run.checkpoint_saved(iteration, folder)
