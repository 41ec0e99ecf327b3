"""Every legal grid of a number of devices: what each needs, and how long a step takes there."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from neox.config import NeoXConfig, agreement, needs
from neox.config.arithmetic import divisors
from neox.model.layout import pad_vocab_size
from neox.plan.memory import least, memory
from neox.plan.messages import work
from neox.plan.stages import PlannedModel
from neox.plan.work import Work

LIBRARIES = 10**9  # bytes of a device for CUDA's context and the libraries', which differ
LARGEST_MICRO_BATCH = 32  # but for a larger one that is given
_KEYS = (
    *("model_parallel_size", "pipe_parallel_size", "train_micro_batch_size_per_gpu"),
    *("checkpoint_activations", "sequence_parallel", "zero_optimization"),
)
_CHECKS = [module.CHECKS.about(*_KEYS) for module in (agreement, needs)]

Seconds = Callable[[NeoXConfig, int, Work], float]  # of a step: (configuration, vocabulary, work)


@dataclass(frozen=True)
class Candidate:
    """A configuration on a grid. `needed` is the fullest rank's peak in bytes.

    Where a part of it does not fit, or a smaller micro-batch's peak, it is theirs, and less than
    the peak.
    """

    config: NeoXConfig
    needed: int
    fits: bool
    seconds: float | None = None  # of a step; None where nobody can say

    @property
    def name(self) -> str:
        c = self.config
        recomputed = ", recomputing" if c.checkpoint_activations else ""
        return (
            f"tp {c.tp} x pp {c.pp} x dp {c.dp}, {c.gradient_accumulation_steps} x "
            f"{c.train_micro_batch_size_per_gpu} samples{recomputed}"
        )


class Models:
    """Planned models by tp, so that what one grid tells is known of all. In `planned_world`."""

    def __init__(self, tokens: int, *, on_cpu: bool) -> None:
        self.tokens = tokens  # of the tokenizer
        self._on_cpu = on_cpu
        self._by_tp: dict[int, PlannedModel] = {}
        self._extrapolates = False

    def rows(self, config: NeoXConfig) -> int:
        return pad_vocab_size(self.tokens, config.make_vocab_size_divisible_by, config.tp)

    def of(self, config: NeoXConfig) -> PlannedModel:
        if config.tp not in self._by_tp:
            self._by_tp[config.tp] = PlannedModel(config, self.rows(config), on_cpu=self._on_cpu)
        model = self._by_tp[config.tp].variant(config)
        model.extrapolates = self._extrapolates
        return model

    def extrapolating(self) -> Models:
        """These, of which large micro-batches' layers are told from those of smaller ones."""
        other = copy.copy(self)
        other._extrapolates = True
        return other


def grids(config: NeoXConfig, devices: int) -> Iterator[NeoXConfig]:
    """`config` with its own global batch on every grid of `devices` that its checks let pass."""
    samples = config.train_batch_size
    for tp in divisors(devices):
        for pp in divisors(devices // tp):
            dp = devices // (tp * pp)
            if samples % dp:
                continue
            pipe = 0 if pp == 1 and config.pipe_parallel_size == 0 else pp
            for size in divisors(samples // dp):
                if size > max(LARGEST_MICRO_BATCH, config.train_micro_batch_size_per_gpu):
                    continue
                for recomputes in (False, True):
                    candidate = dataclasses.replace(
                        config,
                        world_size=devices,
                        model_parallel_size=tp,
                        pipe_parallel_size=pipe,
                        is_pipe_parallel=pipe > 0,
                        train_micro_batch_size_per_gpu=size,
                        gradient_accumulation_steps=samples // dp // size,
                        checkpoint_activations=recomputes,
                    )
                    if not any(any(checks.run(candidate, "plan", set())) for checks in _CHECKS):
                        yield candidate


def evaluate(
    models: Models, config: NeoXConfig, memory_of_device: float, seconds: Seconds | None
) -> Candidate:
    """One configuration: whether it fits and, if so, how long a step takes."""
    model, room = models.of(config), memory_of_device - LIBRARIES
    for activations in (False, True):  # what is soon known decides about most grids
        known = least(model, activations=activations)
        if known > room:
            return Candidate(config, known, fits=False)
    needed = max(stage.total for stage in memory(model))
    if needed > room:
        return Candidate(config, needed, fits=False)
    took = None if seconds is None else seconds(config, models.rows(config), work(model))
    return Candidate(config, needed, fits=True, seconds=took)


def search(
    models: Models,
    config: NeoXConfig,
    devices: int,
    memory_of_device: float,
    seconds: Seconds | None = None,
) -> list[Candidate]:
    """All grids: those that fit first, the fastest before others, or those that need least."""
    models = models.extrapolating()
    found: list[Candidate] = []
    too_large: dict[tuple[int, int, bool], int] = {}
    for c in grids(config, devices):  # micro-batches grow
        key = (c.tp, c.pp, c.checkpoint_activations)
        if models.of(c).untrained():
            continue
        if key in too_large and c.gradient_accumulation_steps >= c.pp:
            # As many are in flight, of larger ones.
            found.append(Candidate(c, too_large[key], fits=False))
            continue
        found.append(evaluate(models, c, memory_of_device, seconds))
        if not found[-1].fits:
            too_large[key] = found[-1].needed
    return sorted(found, key=lambda c: (not c.fits, c.seconds or 0.0, c.needed))


def nearest(found: Sequence[Candidate], config: NeoXConfig) -> Candidate | None:
    """Of those that fit, the one that changes least of `config`."""

    def distance(candidate: Candidate) -> tuple[float, int]:
        c = candidate.config
        pairs = (
            (c.tp, config.tp),
            (c.pp, config.pp),
            (c.train_micro_batch_size_per_gpu, config.train_micro_batch_size_per_gpu),
        )
        steps = sum(abs(math.log2(new / old)) for new, old in pairs)
        return steps + (c.checkpoint_activations != config.checkpoint_activations), candidate.needed

    return min((c for c in found if c.fits), key=distance, default=None)
