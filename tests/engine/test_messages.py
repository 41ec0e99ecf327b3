"""What a training step sends: every message is counted, and the formulas are docs/numerics.md's."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.engine.build import build_engine
from neox.model.layout import LayerLayout
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import NO_PIPELINE, OPTIMIZER, SPLIT, ZERO_1, Case, batches
from tests.models import VOCAB, config_of, model_layers
from tests.world import World, forget_groups

# By what torch calls them; of a send, the sender's side counts.
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all": "all_to_all",
    "all_to_all_single": "all_to_all",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "isend": "send",
    "all_gather_object": "object",
    "broadcast_object_list": "object",
    "barrier": "barrier",
}


class Message(NamedTuple):
    kind: str
    axis: str  # between whom: tp, dp, pp, or the replica's tp x pp
    elements: int  # of the whole: what a gather makes, and a scatter takes
    size: int = 4  # bytes of an element

    def sent(self, ranks: int) -> float:
        """Bytes that a rank of a ring sends; in a reduction to one of them, on average."""
        around = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}
        whole = self.elements * self.size
        return whole * around[self.kind] * (ranks - 1) / ranks if self.kind in around else whole


Messages = Counter[Message]


@contextlib.contextmanager
def recorded(groups: ProcessGroups) -> Iterator[list[Message]]:
    """The messages that this rank sends inside the block, but for those to itself."""
    found: list[Message] = []
    inside = False
    axes = {}
    for axis in ("tp", "pp", "dp", "replica"):
        if (group := getattr(groups, f"{axis}_group")) is not None:
            axes.setdefault(tuple(dist.get_process_group_ranks(group)), axis)

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        group = next((value for value in values if isinstance(value, dist.ProcessGroup)), None)
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        if len(ranks) == 1:
            return
        axis = axes[ranks] if ranks else "pp" if KINDS[name] == "send" else "world"
        given = [value if isinstance(value, list) else [value] for value in values]
        tensors = [[t for t in each if isinstance(t, torch.Tensor)] for each in given]
        elements = max(sum(tensor.numel() for tensor in each) for each in tensors)
        size = max((tensor.element_size() for each in tensors for tensor in each), default=0)
        found.append(Message(KINDS[name], axis, elements, size))

    def counting(name: str, real: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # one of torch's in terms of another
                return real(*args, **kwargs)
            note(name, args, kwargs)
            inside = True
            try:
                return real(*args, **kwargs)
            finally:
                inside = False

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in KINDS:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield found


def step_messages(rank: int, cases: list[Case]) -> list[Messages]:
    """Of the second step: the first one of a pipeline also sends shapes."""
    return [one_step(*case) for case in cases]


def one_step(topology: Topology, values: dict[str, Any]) -> Messages:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = configuration(topology, values)
    checkpoint = Checkpoint.open(Path(config.load)) if config.load else None
    with recorded(groups) as messages:  # DeepSpeed takes some functions at its start
        engine = build_engine(config, groups, VOCAB, checkpoint)
        source = batches(config, groups)
        engine.train_batch(source, 1, 0.01)
        messages.clear()
        engine.train_batch(source, 2, 0.01)
    forget_groups()
    return Counter(messages)


def configuration(topology: Topology, values: dict[str, Any]) -> NeoXConfig:
    return config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        train_micro_batch_size_per_gpu=4 // topology.dp,
        **{"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, **values},
    )


class Sizes(NamedTuple):
    """The letters of the formulas."""

    m: int  # micro-batches
    L: int  # layers of this stage
    A: int  # S x B x H, the activations between two layers
    T: int  # S x B, the tokens of a micro-batch
    R: int  # numbers that ride along with a layer's gradient
    W: list[int]  # this rank's weights that decay, and those that don't

    @classmethod
    def of(cls, config: NeoXConfig, topology: Topology, rank: int) -> Sizes:
        T = 16 * config.train_micro_batch_size_per_gpu
        stage = topology.coordinate(rank).pp
        layers = model_layers(config, ProcessGroups.single())
        depth = config.num_layers // topology.pp
        first, last = 2 + stage * depth, 2 + (stage + 1) * depth
        mine = [
            layer.layout
            for layer in layers
            if layer.layout is not None
            and (
                first <= layer.index < last
                or (stage == 0 and layer.index == 0)
                or (stage == topology.pp - 1 and layer.index > config.num_layers + 1)
            )
        ]
        block = layers[2].layout
        assert block is not None
        riders = [n for n in block if "norm" in n or n.endswith(("dense.bias", "linear2.bias"))]
        return cls(
            m=config.gradient_accumulation_steps,
            L=depth,
            A=T * config.hidden_size,
            T=T,
            R=sum(block[name].numel for name in riders),
            W=[sum(weights(mine, topology.tp, dim)) for dim in (2, 1)],
        )


def weights(layouts: list[LayerLayout], tp: int, dim: int) -> list[int]:
    shapes = [one.shard_shape(tp) for layout in layouts for one in layout.values()]
    return [torch.Size(shape).numel() for shape in shapes if len(shape) == dim]


def expected(config: NeoXConfig, topology: Topology, rank: int) -> Messages:
    """The formulas."""
    pp, dp, tp = topology.pp, topology.dp, topology.tp
    stage = topology.coordinate(rank).pp
    first, last = stage == 0, stage == pp - 1
    m, L, A, T, R, W = Sizes.of(config, topology, rank)
    sums = 1 if config.gpt_j_residual else 2  # of a layer, each way
    count: Messages = Counter()

    def add(number: int, kind: str, axis: str, elements: int, size: int = 4) -> None:
        if number:
            count[Message(kind, axis, elements, size)] += number

    if tp > 1 and config.sequence_parallel:
        add(m * first, "reduce_scatter", "tp", A)  # the embedding, and back
        add(m * first, "all_gather", "tp", A)
        add(2 * m * L * sums, "all_gather", "tp", A)
        add(2 * m * L * sums, "reduce_scatter", "tp", A)
        add(m * L * sums, "all_reduce", "tp", R // sums)
        add(m * last, "all_gather", "tp", A)  # before the final norm
    elif tp > 1:
        add(m * first, "all_reduce", "tp", A)
        add(m * L * sums, "all_reduce", "tp", A)
        add(m * L * sums, "all_reduce", "tp", A + R // sums)
    if tp > 1:
        add(m * last, "all_gather", "tp", 3 * T * tp)  # the loss, and the gradient of its input
        add(m * last, "all_reduce", "tp", A)
    if pp > 1:
        neighbours = (not first) + (not last)
        if tp == 1 or config.sequence_parallel:
            add(m * neighbours, "send", "pp", A // tp)
        else:
            # DeepSpeed sends a 1/tp with a description of it, and gathers: what came, what went
            # (for its backward pass), and its gradient.
            add(m * neighbours, "send", "pp", A // tp)
            add(m * neighbours, "send", "pp", 7 + tp, 8)
            add(m * ((not first) + 2 * (not last)), "all_gather", "tp", A)
    replica = "pp" if tp == 1 else "tp" if pp == 1 else "replica"
    if config.zero_stage == 0:
        if dp > 1:
            add(1, "all_reduce", "dp", sum(W))
        if tp * pp > 1:
            add(1, "all_reduce", replica, 1)  # the gradient's norm
    else:
        if dp > 1:
            zero = config.zero_optimization or {}
            if zero.get("use_multi_rank_bucket_allreduce", True):
                add(1, "all_reduce", "dp", sum(W))
            else:
                add(dp, "reduce", "dp", sum(W) // dp)
            for group in W:
                add(1, "all_gather", "dp", group)
            add(2, "all_reduce", "dp", 1)
        if tp * pp > 1:
            add(2, "all_reduce", replica, 1)
    if dp > 1 and last:
        add(1, "all_reduce", "dp", 1)  # the loss, to be told
    if pp > 1:
        add(1, "broadcast", "pp", 2)
    return count


def sent_bytes(config: NeoXConfig, topology: Topology, rank: int) -> dict[str, float]:
    """The formulas of docs/numerics.md: what a rank sends on each axis, but for single numbers."""
    pp, dp, tp = topology.pp, topology.dp, topology.tp
    stage = topology.coordinate(rank).pp
    first, last = stage == 0, stage == pp - 1
    m, L, A, T, R, W = Sizes.of(config, topology, rank)
    sums = 1 if config.gpt_j_residual else 2
    split = config.sequence_parallel
    if split:
        numbers = m * (2 * A * first + L * (4 * sums * A + 2 * R) + (3 * T * tp + 3 * A) * last)
    else:
        numbers = m * (2 * A * first + L * (4 * sums * A + 2 * R) + (3 * T * tp + 2 * A) * last)
        numbers += m * A * ((not first) + 2 * (not last)) * (pp > 1)
    zero = config.zero_optimization or {}
    halves = 2 + (config.zero_stage == 1) * zero.get("use_multi_rank_bucket_allreduce", True)
    described = 0 if split or tp == 1 else 8 * (7 + tp)
    neighbours = (not first) + (not last)
    return {
        "tp": 4 * numbers * (tp - 1) / tp,
        "pp": m * neighbours * (4 * A / tp + described),
        "dp": 4 * halves * sum(W) * (dp - 1) / dp,
    }


# Each gradient is reduced to the replica that steps its weight, instead of to all of them.
OWNERS = {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False}}

CASES: list[Case] = [
    (Topology(tp=2), NO_PIPELINE),
    (Topology(tp=2), NO_PIPELINE | SPLIT),
    (Topology(tp=2), NO_PIPELINE | {"gpt_j_residual": False}),
    (Topology(tp=2), NO_PIPELINE | {"gpt_j_residual": False} | SPLIT),
    (Topology(pp=2), {}),
    (Topology(dp=2), {}),
    (Topology(dp=2), ZERO_1),
    (Topology(pp=2), ZERO_1),
    (Topology(tp=2), {"gpt_j_tied": True, "norm": "rmsnorm"}),
    (Topology(pp=2, tp=2), {}),
    (Topology(pp=2, tp=2), SPLIT | ZERO_1),
    (Topology(dp=2, tp=2), ZERO_1),
    (Topology(pp=2, dp=2), ZERO_1),
    (Topology(dp=4), ZERO_1),
    (Topology(dp=4), OWNERS),
]


@pytest.mark.parametrize("size", [2, 4])
def test_messages_of_a_step(world: World, size: int) -> None:
    cases = [case for case in CASES if case[0].world_size == size]
    by_rank = world.run(size, step_messages, cases, timeout=300.0)
    for (topology, values), *counts in zip(cases, *by_rank, strict=True):
        config = configuration(topology, values)
        for rank, count in enumerate(counts):
            want = expected(config, topology, rank)
            more, less = count - want, want - count
            assert count == want, f"{topology} {values} rank {rank}: more {more}, less {less}"
            sent = {
                axis: sum(
                    number * message.sent(getattr(topology, axis))
                    for message, number in count.items()
                    if message.axis == axis and message.elements > 2
                )
                for axis in ("tp", "pp", "dp")
            }
            assert sent == pytest.approx(sent_bytes(config, topology, rank), rel=1e-12)
