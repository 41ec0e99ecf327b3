"""The memory of every rank of a planned run, by stage: what it holds, and its peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neox.plan.stages import Chunk, PlannedModel
from neox.plan.state import Held, gathered_bytes, held
from neox.plan.trace import Traced


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage. `total` is the peak of a training step.

    The libraries' own, such as CUDA's context, come on top.
    """

    layers: int  # transformer layers
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward passes of all micro-batches in flight
    in_flight: int  # micro-batches
    temporary: int  # on top, at the worst moment
    host: int = 0  # of what is offloaded, in the CPU's memory

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def memory(model: PlannedModel) -> list[StageMemory]:
    """Of every stage; all ranks of a stage need the same."""
    return [_of_stage(model, number, stage) for number, stage in enumerate(model.stages())]


def of_replica(model: PlannedModel, stage: range, dp_rank: int | None = None) -> Held:
    """Weights, gradients and optimizer state of a rank of a stage; see neox.plan.state.held."""
    key = (stage, model.topology, model.config.is_pipe_parallel, dp_rank)
    if key not in model.held:
        model.held[key] = held(
            model.config,
            model.parameters(stage),
            model.reached(stage),
            model.buffer_bytes(stage),
            dp_rank,
            on_cpu=model.on_cpu,
        )
    return model.held[key]


def in_flight(config_pp: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once, by the 1F1B schedule."""
    return min(config_pp - stage, micro_batches)


def least(model: PlannedModel, *, activations: bool) -> int:
    """Bytes that the fullest rank needs at least, soon known: of state, or with what is kept."""
    found = []
    for number, stage in enumerate(model.stages()):
        own = of_replica(model, stage)
        found.append(own.weights + own.gradients + own.optimizer)
        if activations:
            flying = in_flight(model.config.pp, number, model.config.gradient_accumulation_steps)
            traced = [(chunk, model.traced(chunk)) for chunk in model.chunks(stage)]
            found[-1] += flying * _walk(model, traced, is_last=False)[0]
    return max(found)


def _of_stage(model: PlannedModel, number: int, stage: range) -> StageMemory:
    config = model.config
    is_last = number == config.pp - 1
    own = of_replica(model, stage)
    traced = [(chunk, model.traced(chunk)) for chunk in model.chunks(stage)]
    kept, peak, on_host = _walk(model, traced, is_last)
    flying = in_flight(config.pp, number, config.gradient_accumulation_steps)
    beside = _pipe_buffers(model, number) if config.is_pipe_parallel else _Buffers(0, 0)
    activations = flying * (kept + beside.of_each)
    worst = max(0, peak - kept) + beside.once + gathered_bytes(config, model.trained(stage))
    # ZeRO 1 and 2 have their bucket in the backward pass, but a pipeline's comes after it.
    in_backward = worst + (0 if config.is_pipe_parallel else own.bucket)
    in_step = own.bucket + own.step - activations
    return StageMemory(
        layers=sum(model.is_block(layer) for chunk, _ in traced for layer in chunk.layers),
        weights=own.weights,
        gradients=own.gradients,
        optimizer=own.optimizer,
        activations=activations,
        in_flight=flying,
        temporary=max(in_backward, in_step),
        host=own.host + flying * on_host,
    )


def _walk(
    model: PlannedModel, traced: Sequence[tuple[Chunk, Traced]], is_last: bool
) -> tuple[int, int, int]:
    """Of one micro-batch through a stage: (bytes kept, the peak, bytes kept in the CPU's memory).

    What one chunk puts out is what the next one keeps of it. Backward, what comes later is gone.
    """
    kept, peak, on_host = 0, 0, 0
    in_cpu = model.config.checkpoint_in_cpu
    for chunk, one in traced:
        peak = max(peak, kept + one.forward_peak, kept + one.backward_peak)
        if chunk.recomputed and in_cpu:
            on_host += one.kept
        else:
            kept += one.kept
    if is_last:
        head = model.head
        peak = max(peak, kept + head.forward_peak, kept + head.backward_peak)
    return kept, peak, on_host


@dataclass(frozen=True)
class _Buffers:
    of_each: int  # for each micro-batch in flight
    once: int


def _pipe_buffers(model: PlannedModel, number: int) -> _Buffers:
    """What DeepSpeed's pipeline engine keeps of activations beside what the layers keep.

    Of each micro-batch the tensor that came, where that is another one than the first layer's, and
    what was sent, or this rank's 1/tp of it, or what the loss is of; once the memory in which both
    ways are received.
    """
    config, size = model.config, model.activation_bytes
    is_first, is_last = number == 0, number == config.pp - 1
    splits = config.tp > 1 and not config.sequence_parallel
    sent = size // config.tp if splits else size
    came = 0 if splits or is_first else size
    left = model.loss_input_bytes if is_last else sent
    return _Buffers(came + left, sent * ((not is_first) + (not is_last)))
