"""How long one step of a run takes on a cluster, and of what parts.

A stage's forward pass of one micro-batch takes

    FLOPs / (peak x products) + bytes / (bandwidth x memory) + its messages' time,

where `products`, `memory` and `links` are the shares of the hardware's rates that a training
reaches (neox.plan.cluster.Reached). The bytes are those of element-wise work (neox.plan.traffic):
they fall more slowly with tp and with width than the FLOPs do, so that narrow shards reach less of
the peak, as measured ones do. A backward pass is counted likewise, the forward pass's own once more
where activations are recomputed. The schedule of the pipeline
(neox.plan.schedule) makes a step of them; what cannot be hidden behind it, gradients' messages
and the optimizer's bytes, comes after.

A collective of n ranks moves `factor` x bytes over the narrowest link of a ring, with the factors
of NCCL's tests (2 (n - 1) / n for an all-reduce), and waits for a message's latency along a tree:
that of 2 log2 n messages for an all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neox.parallel.topology import Topology
from neox.plan.cluster import Cluster
from neox.plan.schedule import Order, Timeline, pipeline_seconds, simulate
from neox.plan.traffic import NONE, Shape
from neox.plan.work import Message, StageWork, Work

DAY, HOUR = 86400.0, 3600.0
_DESCRIPTION = 1024  # bytes; less than any activation that is worth a pipeline


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage's rank: `forward` and `backward` of one micro-batch, without sends."""

    forward: float
    backward: float
    products: float  # of one micro-batch, both passes
    memory: float
    tensor_parallel: float
    after: float  # gradients' messages that nothing hides, once a step
    optimizer: float  # once a step


@dataclass(frozen=True)
class StepTime:
    """One step. `parts` add up to `seconds`; they are the slowest stage's."""

    seconds: float
    parts: dict[str, float]
    tokens_per_second: float
    flops_per_second: float  # of one device, recomputation counted


def step_time(
    work: Work, shape: Shape, cluster: Cluster, *, order: Order = "1f1b", chunks: int = 1
) -> StepTime:
    """What a step of `work` takes. Raises ConfigError when the cluster lacks its dtype.

    More than one chunk is the interleaved schedule, which this engine does not have.
    """
    grid = work.topology
    stages, send = _stages(work, shape, cluster)
    forward, backward = [s.forward for s in stages], [s.backward for s in stages]
    pipeline = pipeline_seconds(forward, backward, work.micro_batches, order, send, chunks)
    slowest = max(range(grid.pp), key=lambda i: forward[i] + backward[i])
    stage = stages[slowest]
    transfers = work.micro_batches * send * _transfers(slowest, grid.pp, chunks)
    computing = {
        "matrix products": work.micro_batches * stage.products,
        "element-wise work": work.micro_batches * stage.memory,
        "tensor-parallel messages": work.micro_batches * stage.tensor_parallel,
    }
    last = max(stages, key=lambda each: each.after + each.optimizer)
    parts = {
        **computing,
        "pipeline messages": transfers,
        "pipeline bubble": max(0.0, pipeline - transfers - sum(computing.values())),
        "data-parallel messages": last.after,
        "optimizer": last.optimizer,
    }
    seconds = pipeline + last.after + last.optimizer
    flops = sum(work.flops.values()) / grid.world_size
    return StepTime(seconds, parts, work.tokens / seconds, flops / seconds)


def step_timeline(work: Work, shape: Shape, cluster: Cluster) -> Timeline:
    """When each stage of a step works and when it waits, for a picture."""
    stages, send = _stages(work, shape, cluster)
    forward, backward = [s.forward for s in stages], [s.backward for s in stages]
    return simulate(forward, backward, work.micro_batches, send=send)


def _stages(work: Work, shape: Shape, cluster: Cluster) -> tuple[list[StageTime], float]:
    """The times of every stage, and of the longest send between two."""
    grid = work.topology
    cluster = cluster.for_ranks(grid.world_size)
    stages = [stage_time(work, i, shape, cluster) for i in range(grid.pp)]
    sends = [_seconds_of_a_send(stage.messages, grid, cluster) for stage in work.stages]
    return stages, max(sends)


def stage_time(work: Work, stage: int, shape: Shape, cluster: Cluster) -> StageTime:
    """The times of a rank of one stage."""
    mine: StageWork = work.stages[stage]
    rate, bandwidth = cluster.product_rate(work.dtype), cluster.memory_rate
    recomputes = mine.recompute_flops > 0
    layers = shape.layer.times(mine.layers / bandwidth)
    head = shape.head.times(1 / bandwidth) if stage == len(work.stages) - 1 else NONE
    tp_forward, tp_backward = _tensor_parallel(mine.messages, work, cluster, recomputes)
    products_forward = mine.forward_flops / rate
    products_backward = (mine.backward_flops + mine.recompute_flops) / rate
    memory_forward = layers.forward + head.forward
    memory_backward = layers.backward + head.backward + layers.forward * recomputes
    memory_backward += mine.layers * shape.accumulation / bandwidth
    forward = products_forward + memory_forward + tp_forward
    backward = products_backward + memory_backward + tp_backward
    return StageTime(
        forward=forward,
        backward=backward,
        products=products_forward + products_backward,
        memory=memory_forward + memory_backward,
        tensor_parallel=tp_forward + tp_backward,
        after=_exposed(mine.messages, work.topology, cluster, behind=backward),
        optimizer=mine.optimizer_bytes / bandwidth,
    )


def message_seconds(message: Message, grid: Topology, cluster: Cluster) -> float:
    """All calls of a message together."""
    size, stride = _group(message.axis, grid)
    if size == 1 or message.count == 0:
        return 0.0
    # Ranks are numbered along tp, dp, pp, and fill one machine after the other.
    near = min(size, max(1, cluster.devices_per_node // stride))
    link = cluster.node if near == size else cluster.network
    bandwidth = link.bandwidth
    if near < size and message.operation != "send":
        # A ring enters a machine once, so all links of the group's ranks there carry it.
        bandwidth = min(cluster.node.bandwidth, near * bandwidth) if near > 1 else bandwidth
    factor, hops = {
        "all_reduce": (2 * (size - 1) / size, 2 * math.log2(size)),
        "reduce_scatter": ((size - 1) / size, math.log2(size)),
        "all_gather": ((size - 1) / size, math.log2(size)),
        "reduce": (1.0, math.log2(size)),
        "broadcast": (1.0, math.log2(size)),
        "send": (1.0, 1.0),
    }[message.operation]
    latency = message.count * hops * link.latency
    return latency + factor * message.bytes / (bandwidth * cluster.reached.links)


def _group(axis: str, grid: Topology) -> tuple[int, int]:
    """(ranks in a group, distance of neighbours)."""
    return {
        "tp": (grid.tp, 1),
        "dp": (grid.dp, grid.tp),
        "pp": (grid.pp, grid.tp * grid.dp),
        # A replica's ranks lie far apart, unless there is one only.
        "replica": (grid.tp * grid.pp, 1 if grid.dp == 1 else grid.tp * grid.dp),
    }[axis]


def _seconds_of_a_send(messages: Sequence[Message], grid: Topology, cluster: Cluster) -> float:
    """On average over those of a stage: activations go forward, their gradients back.

    DeepSpeed's descriptions of tensors are a part of their sends.
    """
    sends = [m for m in messages if m.operation == "send" and m.axis == "pp"]
    count = sum(m.count for m in sends if m.bytes > m.count * _DESCRIPTION)
    return sum(message_seconds(m, grid, cluster) for m in sends) / count if count else 0.0


def _transfers(stage: int, stages: int, chunks: int) -> int:
    """Sends and receives of a stage for one micro-batch, both directions."""
    if stages == 1:
        return 0
    if chunks == 1:
        return 2 * ((stage > 0) + (stage < stages - 1))
    ends = (stage == 0) + (stage == stages - 1)  # the first chunk's input, the last one's output
    return 4 * chunks - 2 * ends


def _tensor_parallel(
    messages: Sequence[Message], work: Work, cluster: Cluster, recomputes: bool
) -> tuple[float, float]:
    """Seconds of tp messages in one micro-batch's forward and backward pass.

    Both have as many. A recomputation repeats the forward pass's, in this engine fewer of them; a
    pipeline of equal stages takes as long, to whichever pass a message is counted.
    """
    total = sum(message_seconds(m, work.topology, cluster) for m in messages if m.axis == "tp")
    each = total / work.micro_batches
    forward = each / (3 if recomputes else 2)
    return forward, each - forward


def _exposed(messages: Sequence[Message], grid: Topology, cluster: Cluster, behind: float) -> float:
    """Seconds of a step's other messages that the last backward pass does not hide."""
    rest = [m for m in messages if m.axis != "tp" and m.operation != "send"]
    hidden = sum(message_seconds(m, grid, cluster) for m in rest if m.overlaps)
    exposed = sum(message_seconds(m, grid, cluster) for m in rest if not m.overlaps)
    return exposed + max(0.0, hidden - behind)


@dataclass(frozen=True)
class RunCost:
    """A whole run, without interruptions, validation and checkpoints."""

    seconds: float
    device_hours: float
    price: float | None  # in the currency of the cluster's price

    @property
    def days(self) -> float:
        return self.seconds / DAY


def run_cost(step: float, iterations: int, devices: int, price: float | None) -> RunCost:
    """`step` seconds an iteration on so many devices; `price` of one device for an hour."""
    seconds = step * iterations
    hours = seconds * devices / HOUR
    return RunCost(seconds, hours, None if price is None else hours * price)
