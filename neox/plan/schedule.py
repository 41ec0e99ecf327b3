"""When each stage of a pipeline works, and when it waits: a simulation of one step.

Times are seconds, or any other unit: all of one call are in the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Order = Literal["1f1b", "gpipe"]
_FILLED = 2  # groups of as many micro-batches as stages, after which a pipeline repeats itself


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one stage, or one chunk of it."""

    is_forward: bool
    micro_batch: int
    chunk: int = 0  # which of the stage's chunks of layers, when schedules are interleaved


class Slot(NamedTuple):
    """A pass with its time."""

    stage: int
    work: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline, without what follows the last backward pass."""

    stages: int
    slots: tuple[Slot, ...]
    seconds: float  # from the first pass's start to the last one's end

    @property
    def busy(self) -> list[float]:
        """Seconds that each stage computes."""
        busy = [0.0] * self.stages
        for slot in self.slots:
            busy[slot.stage] += slot.end - slot.start
        return busy

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they wait."""
        return 1 - sum(self.busy) / (self.stages * self.seconds) if self.seconds else 0.0


def passes(
    order: Order, stages: int, stage: int, micro_batches: int, chunks: int = 1
) -> list[Pass]:
    """A stage's passes, in their order.

    gpipe: all forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965).
    1f1b: as many forward passes as stages follow, then one forward and one backward in turn
    (Narayanan et al. 2021, arXiv:2104.04473); DeepSpeed's TrainSchedule has the same order, and
    so have runs of this engine. With several chunks, that paper's interleaved schedule, which
    this engine does not have: its published runs need it. Micro-batches go through a chunk in
    groups of as many as there are stages.
    """
    count = micro_batches * chunks
    assert chunks == 1 or micro_batches % stages == 0, "interleaving needs whole groups"

    def forward(i: int) -> Pass:
        group, within = divmod(i, stages * chunks)
        return Pass(True, group * stages + within % stages, within // stages)

    def backward(i: int) -> Pass:
        group, within = divmod(i, stages * chunks)
        return Pass(False, group * stages + within % stages, chunks - 1 - within // stages)

    if order == "gpipe":
        ahead = count
    elif chunks == 1:
        ahead = min(stages - stage - 1, count)
    else:
        ahead = min((stages - stage - 1) * 2 + (chunks - 1) * stages, count)
    forwards = [forward(i) for i in range(count)]
    backwards = [backward(i) for i in range(count)]
    alternating = [each for pair in zip(forwards[ahead:], backwards, strict=False) for each in pair]
    return forwards[:ahead] + alternating + backwards[count - ahead :]


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int,
    order: Order = "1f1b",
    send: float = 0.0,
    chunks: int = 1,
) -> Timeline:
    """One step of a pipeline whose stage i takes forward[i] and backward[i] for a micro-batch.

    `send` is what a stage's output takes to the next stage, and its gradient back. It keeps both
    of them, as DeepSpeed's blocking sends do, and is part of both their passes' slots.
    """
    stages = len(forward)
    orders = [passes(order, stages, stage, micro_batches, chunks) for stage in range(stages)]
    done: dict[tuple[int, Pass], float] = {}
    free = [0.0] * stages
    at = [0] * stages
    slots: list[Slot] = []
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, queue in enumerate(orders):
            while at[stage] < len(queue):
                work = queue[at[stage]]
                needed = _needed(stage, work, stages, chunks)
                if needed is not None and needed not in done:
                    break
                received = send * (needed is not None and needed[0] != stage)
                sent = send * _sends(stage, work, stages, chunks)
                ready = 0.0 if needed is None else done[needed] - received
                start = max(free[stage], ready)
                computing = (forward if work.is_forward else backward)[stage] / chunks
                end = start + received + computing + sent
                free[stage] = done[stage, work] = end
                slots.append(Slot(stage, work, start, end))
                at[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return Timeline(stages, tuple(slots), max(free))


def pipeline_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int,
    order: Order = "1f1b",
    send: float = 0.0,
    chunks: int = 1,
) -> float:
    """`simulate(...).seconds`, without a simulation of the whole of a long step.

    Once 1F1B has filled the pipeline, each further group of as many micro-batches as there are
    stages takes as long as the one before. Uneven chunks may take longer to come to that.
    """
    stages = len(forward)
    few = _FILLED * stages + micro_batches % stages
    if order == "gpipe" or chunks > 1 or micro_batches <= few + stages:
        return simulate(forward, backward, micro_batches, order, send, chunks).seconds
    shorter, longer = (
        simulate(forward, backward, count, order, send, chunks).seconds
        for count in (few, few + stages)
    )
    groups = (micro_batches - few) // stages
    return shorter + groups * (longer - shorter)


def _needed(stage: int, work: Pass, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """What a pass waits for; None for a micro-batch's first."""
    is_forward, micro_batch, chunk = work
    if is_forward:
        if stage > 0:
            return stage - 1, work
        return (stages - 1, Pass(True, micro_batch, chunk - 1)) if chunk else None
    if stage < stages - 1:
        return stage + 1, work
    if chunk < chunks - 1:
        return 0, Pass(False, micro_batch, chunk + 1)
    return stage, Pass(True, micro_batch, chunk)


def _sends(stage: int, work: Pass, stages: int, chunks: int) -> bool:
    """Whether another stage waits for what a pass finds."""
    if stages == 1:
        return False
    if work.is_forward:
        return stage < stages - 1 or work.chunk < chunks - 1
    return stage > 0 or work.chunk > 0
