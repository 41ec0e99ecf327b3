"""The training loop, whole: rate, step, log, validate, save."""

from __future__ import annotations

import time
from pathlib import Path

from neox import log, progress
from neox.checkpoint.directory import keep_last, write_checkpoint, write_file
from neox.checkpoint.manifest import HAS_MANIFEST, Entry
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.data.changes import order_facts
from neox.data.loaders import Loaders
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.observe import Observation
from neox.parallel.groups import ProcessGroups
from neox.train.cadence import is_save_iteration
from neox.train.divergence import Guard
from neox.train.evaluations import Evaluations
from neox.train.metrics import RunLog, StepResult
from neox.train.profiling import Profiler
from neox.train.saved_schedule import SAVED, schedule_state
from neox.train.schedule import rate_reported, rate_used


def train(
    config: NeoXConfig,
    groups: ProcessGroups,
    engine: DeepSpeedEngine,
    loaders: Loaders,
    evaluations: Evaluations,
    run: RunLog,
    iteration: int,
    padded_vocab_size: int,
) -> int:
    """Train from `iteration` finished steps to `train_iters`; return the steps then finished.

    Collective over the world.
    """
    assert config.train_iters is not None and loaders.train is not None, "checked before"
    observation = Observation(engine, config)
    guard = Guard(config, groups, engine, loaders.train)
    profiler = Profiler(config, groups)
    batches = observation.batches(loaders.train)
    if iteration == 0 and is_save_iteration(config, 0):
        save(config, groups, engine, evaluations, run, 0, padded_vocab_size)
    while iteration < config.train_iters:
        iteration += 1
        progress.begin_step(iteration)
        observation.start()
        started = time.perf_counter()
        with profiler.iteration(iteration):
            step = engine.train_batch(batches, iteration, rate_used(config, iteration))
            seconds = time.perf_counter() - started
        run.train_step(
            iteration,
            StepResult(
                loss=step.loss,
                learning_rate=rate_reported(config, iteration),
                grad_norm=step.grad_norm,
                skipped=step.skipped,
                loss_scale=step.loss_scale,
                seconds=seconds,
                timers=observation.timers(),
                norms=observation.norms(),
            ),
        )
        guard.check(iteration, step)
        if iteration % config.eval_interval == 0 and (found := evaluations.validate(iteration)):
            run.evaluation("validation", iteration, found)
        stops = progress.stops_after(iteration)
        if is_save_iteration(config, iteration) or stops:
            save(config, groups, engine, evaluations, run, iteration, padded_vocab_size)
        if stops:
            log.info(f"stopped after iteration {iteration}, as {progress.asked_by()} asked")
            break
        if config.exit_interval and iteration % config.exit_interval == 0:
            break
    profiler.close(iteration)
    return iteration


def save(
    config: NeoXConfig,
    groups: ProcessGroups,
    engine: DeepSpeedEngine,
    evaluations: Evaluations,
    run: RunLog,
    iteration: int,
    padded_vocab_size: int,
) -> None:
    """Write a checkpoint and prune old ones. Collective over the world. CheckpointError."""
    assert config.save is not None
    run.flush()
    directory = Path(config.save)
    state = {
        "iteration": iteration,
        SAVED: schedule_state(config, iteration),
        HAS_MANIFEST: True,
        "data": order_facts(config, evaluations.loaders.train),
    }
    texts = evaluations.fingerprint()

    def write(aside: Path) -> dict[str, Entry]:
        written = engine.save(aside, state)
        if groups.rank == 0:
            written |= {name: write_file(aside / name, text) for name, text in texts.items()}
        return written

    folder = write_checkpoint(
        directory,
        iteration,
        write,
        config.config_files or {},
        groups,
        grid={"tp": groups.tp, "pp": groups.pp, "dp": groups.dp},
        padded_vocab_size=padded_vocab_size,
        architecture=architecture(config),
    )
    if config.keep_last_n_checkpoints:
        keep_last(directory, config.keep_last_n_checkpoints, groups)
    run.checkpoint_saved(iteration, folder)
