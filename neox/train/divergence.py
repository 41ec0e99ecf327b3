"""Stops a run whose loss or gradient is not a number any more, and says where that began."""

from __future__ import annotations

import math
from pathlib import Path

from neox import log
from neox.checkpoint.folders import latest_name
from neox.config import NeoXConfig
from neox.data.loaders import Loader
from neox.engine.base import TrainStep
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.replay import Fault, first_fault
from neox.errors import DivergenceError
from neox.parallel.groups import ProcessGroups
from neox.train.schedule import rate_used

MOST_OVERFLOWS = 50  # in a row, as upstream: the loss scale needs some to find down from 2^32
MOST_DOCUMENTS = 12  # that a message names


class Guard:
    """Looks at every step's outcome. Collective over the world; free while all is well.

    A step whose loss or gradient is not finite changes no weights. In float16 that is how the loss
    scale is found, so only MOST_OVERFLOWS in a row are an end; otherwise the first is: the next
    batch may pass, but what came to an infinity once is on its way there.
    """

    def __init__(
        self, config: NeoXConfig, groups: ProcessGroups, engine: DeepSpeedEngine, loader: Loader
    ) -> None:
        self._config = config
        self._groups = groups
        self._engine = engine
        self._loader = loader
        self._overflows = 0

    def check(self, iteration: int, step: TrainStep) -> None:
        """Raises DivergenceError on every rank, with the same message."""
        loss, norm = step.loss, step.grad_norm
        is_bad = step.skipped or not math.isfinite(loss) or not math.isfinite(norm or 0.0)
        self._overflows = self._overflows + 1 if is_bad else 0
        if self._overflows < (1 if step.loss_scale is None else MOST_OVERFLOWS):
            return
        if step.loss_scale is not None:
            problem = (
                f"{self._overflows} steps in a row were skipped because a value overflowed float16 "
                f"(the loss scale is down to {step.loss_scale:g})"
            )
        elif not math.isfinite(loss):
            problem = f"the loss is {loss}"
        else:
            problem = "the gradient is not finite"
        log.warning(f"iteration {iteration}: {problem}. Doing the step again to find where ...")
        self._stop(iteration, problem)

    def _stop(self, iteration: int, problem: str) -> None:
        first = (iteration - 1) * self._config.gradient_accumulation_steps
        numbers = range(first, first + self._config.gradient_accumulation_steps)
        batches = (self._loader.read(number) for number in numbers)
        fault = first_fault(self._engine, batches, iteration, rate_used(self._config, iteration))
        raise DivergenceError(
            f"iteration {iteration}: {problem}. {self._where(fault)}"
            f"{self._documents(fault, numbers)} {self._last_checkpoint()}"
        )

    def _where(self, fault: Fault | None) -> str:
        if fault is None:
            return (
                "Done again, the step has no such value on any one rank: it came from the sum over "
                "the ranks, or from a device or a network that does not compute the same twice."
            )
        at = self._groups.topology.coordinate(fault.rank)
        rank = f"rank {fault.rank} (pp {at.pp}, dp {at.dp}, tp {at.tp})"
        if fault.micro_batch < 0:
            return (
                f"The weight {fault.name} itself holds {fault.value}, on {rank}: the model was bad "
                "before this step."
            )
        return (
            f"The first {fault.value} is in the {fault.what} of {fault.name}, on {rank}, in "
            f"micro-batch {fault.micro_batch} of the step."
        )

    def _documents(self, fault: Fault | None, numbers: range) -> str:
        """The documents of the faulty micro-batch; without one, of what rank 0 read in the step."""
        if fault is not None and fault.micro_batch < 0:
            return ""
        rank, which = 0, numbers
        if fault is not None:
            rank, which = fault.rank, numbers[fault.micro_batch : fault.micro_batch + 1]
        rows = []
        if self._groups.rank == rank:
            rows = [row for number in which for row in self._loader.origins(number)]
        parts = [
            f"{at.prefix} document {at.document} (tokens {at.start} to {at.stop})"
            for row in self._groups.gather(rows)[rank]
            for at in row
        ]
        more = len(parts) - MOST_DOCUMENTS
        return (
            f" It read {'; '.join(parts[:MOST_DOCUMENTS])}"
            f"{f'; and {more} more' if more > 0 else ''} (tools/data.py show CONFIG --step "
            f"{numbers.stop // len(numbers)} --rank {rank})."
        )

    def _last_checkpoint(self) -> str:
        found = None
        for directory in (self._config.save, self._config.load):
            if found is None and directory is not None and (name := latest_name(Path(directory))):
                found = Path(directory) / name
        newest = self._groups.gather(found)[0]
        if newest is None:
            return "There is no checkpoint to go back to."
        return (
            f"Nothing was saved over the last checkpoint, {newest}. To go on from there, change "
            "what led here: a lower learning rate or gradient_clipping, or other data."
        )
