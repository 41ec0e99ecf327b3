"""What a training run tells about itself: metrics.jsonl, trackers, console lines, the live line.

Keys are NeoX's W&B keys. Every iteration has `train/learning_rate`, `train/lm_loss`, one
`train/{name}` per further metric, `train/grad_norm` where it is known, `train/loss_scale` under
fp16, and the norms that are asked for; every `log_interval` iterations the `runtime/*` keys join,
and `timers/*` with wall_clock_breakdown. Evaluations add `validation/*` and `test/*`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neox import log
from neox.config import NeoXConfig
from neox.parallel.groups import ProcessGroups
from neox.train import console
from neox.train.journal import Journal
from neox.train.memory import memory_in_mb
from neox.train.trackers import open_trackers


@dataclass(frozen=True)
class StepResult:
    """One finished training iteration, the same on every rank that logs."""

    loss: float  # mean over the global batch, in nats per token
    learning_rate: float  # schedule.rate_reported of this iteration
    seconds: float  # wall time of the iteration, reading the batch included
    grad_norm: float | None = None  # global norm before clipping
    skipped: bool = False  # the optimizer did not step (fp16 overflow)
    loss_scale: float | None = None  # fp16 only
    metrics: Mapping[str, float] = field(default_factory=dict)  # further losses by name
    norms: Mapping[str, float] = field(default_factory=dict)  # of single parameters, by key
    timers: Mapping[str, float] = field(default_factory=dict)  # seconds of the step's parts


class RunLog:
    """The log of one run. A context manager; no method is collective.

    Every rank makes one and calls it alike; only rank 0 writes and prints. `iteration` is the one
    that training starts from: later records of an earlier run in the same folders are dropped, so
    that a resumed run repeats none.
    """

    def __init__(
        self, config: NeoXConfig, groups: ProcessGroups, *, iteration: int, padded_vocab_size: int
    ) -> None:
        self._config = config
        self._flops = flops_per_iteration(config, padded_vocab_size) / groups.world_size
        self._device = groups.device
        self._interval: list[StepResult] = []
        self._memory_is_told = False
        self._trackers = open_trackers(config, groups.rank, iteration)
        if config.log_dir is None:
            log.info("log_dir is not set: no metrics.jsonl is written")
        elif groups.rank == 0:
            path = Path(config.log_dir) / "metrics.jsonl"
            tokens = config.train_batch_size * config.seq_length
            self._trackers.add(
                "metrics.jsonl", lambda: Journal(path, iteration, tokens_per_iteration=tokens)
            )
        self._bar = log.progress(total=config.train_iters, initial=iteration, desc="training")
        self._last_checkpoint: float | None = None

    def train_step(self, iteration: int, step: StepResult) -> None:
        """Record one iteration; print its line when a log interval is complete."""
        self._interval.append(step)
        values = {"train/learning_rate": step.learning_rate, "train/lm_loss": step.loss}
        values |= {f"train/{name}": value for name, value in step.metrics.items()}
        if step.grad_norm is not None:
            values["train/grad_norm"] = step.grad_norm
        if step.loss_scale is not None:
            values["train/loss_scale"] = step.loss_scale
        values |= step.norms
        if iteration % self._config.log_interval == 0:
            values |= self._finish_interval(iteration)
        self._trackers.log(values, iteration)
        self._bar.set_postfix_str(self._live(step), refresh=False)
        self._bar.update(1)

    def evaluation(
        self, chart: str, iteration: int, metrics: Mapping[str, float], at: str | None = None
    ) -> None:
        """Record an evaluation and print its box.

        `chart` is "validation" or "test"; `at` is what the box says instead of "iteration N".
        """
        log.info(console.evaluation_box(chart, at or f"iteration {iteration}", metrics))
        values = {f"{chart}/{name}": value for name, value in metrics.items()}
        self._trackers.log(values, iteration)

    def flush(self) -> None:
        """Put what was recorded on disk: a checkpoint follows, and a resumed run starts there."""
        self._trackers.flush()

    def checkpoint_saved(self, iteration: int, path: Path) -> None:
        """Say where a checkpoint is; the live line shows its age from now on."""
        log.info(f"checkpoint of iteration {iteration} saved in {path}")
        self._last_checkpoint = time.monotonic()

    def _finish_interval(self, iteration: int) -> dict[str, float]:
        """Print the interval's lines and start a new one; its `runtime/*` and `timers/*`."""
        config, steps = self._config, self._interval
        seconds = sum(step.seconds for step in steps) / len(steps)
        model_flops = self._flops / seconds
        # Recomputing the activations is work done by the hardware that the model did not need.
        hardware_flops = model_flops * (4 / 3 if config.checkpoint_activations else 1)
        samples = config.train_batch_size / seconds
        runtime = {
            "runtime/samples_per_sec": samples,
            "runtime/iteration_time": seconds,
            "runtime/steps_per_sec": 1 / seconds,
            "runtime/tokens_per_sec": samples * config.seq_length,
            "runtime/flops_per_sec_per_gpu": hardware_flops,
        }
        utilization = None
        if config.peak_theoretical_tflops:
            peak = config.peak_theoretical_tflops * 1e12
            utilization = (100 * model_flops / peak, 100 * hardware_flops / peak)
            runtime["runtime/model_flops_utilization"] = utilization[0]
            runtime["runtime/hardware_flops_utilization"] = utilization[1]
        log.info(
            console.training_line(
                iteration=iteration,
                train_iters=config.train_iters,
                samples_per_second=samples,
                seconds_per_iteration=seconds,
                learning_rate=steps[-1].learning_rate,
                flops_per_second=hardware_flops,
                utilization=utilization,
                losses=mean_losses(steps),
                loss_scale=steps[-1].loss_scale,
                skipped=sum(step.skipped for step in steps),
                nan=sum(not math.isfinite(step.loss) for step in steps),
            )
        )
        if not self._memory_is_told:
            self._memory_is_told = True
            log.info(console.memory_line(iteration, memory_in_mb(self._device)))
        timers = {
            name: sum(step.timers.get(name, 0.0) for step in steps) / len(steps)
            for name in steps[-1].timers
        }
        if timers:
            log.info(console.timers_line(timers))
        self._interval = []
        return runtime | {f"timers/{name}": value for name, value in timers.items()}

    def _live(self, step: StepResult) -> str:
        tokens = self._config.train_batch_size * self._config.seq_length / step.seconds
        parts = [f"loss {step.loss:.4f}", f"{tokens:,.0f} tokens/s"]
        if step.grad_norm is not None:
            parts.append(f"gradient norm {step.grad_norm:.2f}")
        if self._last_checkpoint is not None:
            age = console.human_seconds(time.monotonic() - self._last_checkpoint)
            parts.append(f"checkpoint {age} ago")
        return ", ".join(parts)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        self._trackers.close(failed=kind is not None)


def mean_losses(steps: Sequence[StepResult]) -> dict[str, float]:
    """`lm_loss` and further metrics, averaged over the steps that counted; NaN if none did."""
    counted = [{"lm_loss": step.loss, **step.metrics} for step in steps if not step.skipped]
    if not counted:
        return {"lm_loss": math.nan}
    return {name: sum(losses[name] for losses in counted) / len(counted) for name in counted[0]}


def flops_per_iteration(config: NeoXConfig, padded_vocab_size: int) -> float:
    """Floating-point operations of one forward and backward pass over the global batch.

    Equation 3 of Narayanan et al. 2021 (arXiv:2104.04473) is 96 b s L h^2 (1 + s/6h + V/16Lh) with
    each activation computed twice: four passes over the model's products, of which a plain
    iteration makes three. NeoX takes three quarters of all of it, the head's share too, although
    that is never recomputed; so does this.
    """
    b, s = config.train_batch_size, config.seq_length
    n, h = config.num_layers, config.hidden_size
    return 24 * 3 * b * s * n * h**2 * (1 + s / (6 * h) + padded_vocab_size / (16 * n * h))
