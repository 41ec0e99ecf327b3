"""A NaN stops every rank at once and is traced to its module, its rank and its documents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox.data.loaders import Batch, Loader
from neox.data.samples import Origin
from neox.engine.base import TrainStep
from neox.engine.build import build_engine
from neox.errors import DivergenceError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.train import divergence
from neox.train.divergence import Guard
from tests.models import VOCAB, config_of, tokens
from tests.world import World

BAD_STEP, BAD_MICRO_BATCH = 2, 1


class Text:
    """A Loader's part: micro-batch n of replica r is document 10 n + r."""

    def __init__(self, groups: ProcessGroups, size: int) -> None:
        self.groups, self.size = groups, size
        self.next = 0

    def __iter__(self) -> Text:
        return self

    def __next__(self) -> Batch:
        self.next += 1
        return self.read(self.next - 1)

    def read(self, micro_batch: int) -> Batch:
        text = tokens(batch=self.size, length=17, seed=10 * micro_batch + self.groups.dp_rank)
        return Batch(text[:, :-1], text[:, 1:], torch.ones(self.size, 16))

    def origins(self, micro_batch: int) -> list[list[Origin]]:
        document = 10 * micro_batch + self.groups.dp_rank
        return [[Origin("data/x", document, 3, 20)] for _ in range(self.size)]


class Planted:
    """Makes the outputs of a module, or their gradients, NaN in one micro-batch of one step."""

    def __init__(self, engine: Any, name: str, dp_rank: int, backward: bool) -> None:
        self.engine, self.backward = engine, backward
        self.iteration = self.calls = 0
        start_iteration = engine.streams.start_iteration

        def started(iteration: int) -> None:
            self.iteration, self.calls = iteration, 0
            start_iteration(iteration)

        engine.streams.start_iteration = started
        index, _, inner = name.partition(".")
        for layer, module in engine.local:
            if layer.index == int(index) and engine.groups.dp_rank == dp_rank:
                (module.get_submodule(inner) if inner else module).register_forward_hook(self)

    def __call__(self, module: object, arguments: object, output: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            return output
        self.calls += 1
        if self.iteration != BAD_STEP or self.calls != BAD_MICRO_BATCH + 1:
            return output
        if self.backward:
            output.register_hook(lambda gradient: gradient * math.nan)
            return output
        output.data.fill_(math.nan)  # nothing that recomputation would have to repeat
        return output


def run(
    rank: int, topology: Topology, values: dict[str, Any], folder: str, plant: dict[str, Any]
) -> str:
    """Train until the guard stops it: its message."""
    groups = initialize(topology, "gloo", torch.device("cpu"))
    size = 2
    config = config_of(
        world_size=topology.world_size,
        **{
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "train_micro_batch_size_per_gpu": size,
            "num_layers": 4,
            "save": folder,
            "checkpoint_factor": 100,
            **values,
        },
    )
    engine = build_engine(config, groups, VOCAB)
    loader = Text(groups, size)
    guard = Guard(config, groups, engine, loader)
    weight, huge = plant.pop("weight", None), plant.pop("huge", None)
    if plant:
        Planted(engine, **plant)
    for iteration in range(1, 5):
        for layer, module in engine.local if iteration == BAD_STEP else ():
            for name, parameter in module.named_parameters() if layer.has_file else ():
                if f"{layer.index}.{name}" == weight:
                    parameter.data.view(-1)[-1] = math.nan
                if f"{layer.index}.{name}" == huge:
                    parameter.data.fill_(3e38)
        step = engine.train_batch(loader, iteration, 0.01)
        try:
            guard.check(iteration, step)
        except DivergenceError as error:
            return str(error)
        before = {id(p): p.detach().clone() for _, m in engine.local for p in _parameters(m)}
        assert all(bool(torch.isfinite(p).all()) for p in before.values())
    raise AssertionError("the run went on")


def _parameters(module: Any) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []


FORWARD = {"name": "3.attention", "dp_rank": 0, "backward": False}
GRIDS: list[tuple[Topology, dict[str, Any]]] = [
    (Topology(), {"zero_optimization": {"stage": 0}}),
    (Topology(), {"zero_optimization": {"stage": 1}, "pipe_parallel_size": 0}),
    (Topology(), {"zero_optimization": {"stage": 0}, "pipe_parallel_size": 0}),
    (Topology(pp=2, tp=2), {}),
    (Topology(pp=2, dp=2), {"checkpoint_activations": True}),
    (Topology(dp=2), {"zero_optimization": {"stage": 2}, "pipe_parallel_size": 0}),
    (Topology(dp=2), {"zero_optimization": {"stage": 3}, "pipe_parallel_size": 0}),
    (Topology(tp=2), {"sequence_parallel": True}),
    (Topology(pp=2), {"precision": "bfloat16"}),
    (Topology(tp=2), {"precision": "bfloat16", "pipe_parallel_size": 0}),
]


@pytest.mark.parametrize(("topology", "values"), GRIDS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_first_bad_module_is_named_on_every_rank(
    world: World, tmp_path: Path, topology: Topology, values: dict[str, Any], backward: bool
) -> None:
    (tmp_path / "latest").write_text("global_step1")
    dp_rank = topology.dp - 1
    plant = {"name": "3.attention", "dp_rank": dp_rank, "backward": backward}
    said = world.run(topology.world_size, run, topology, values, str(tmp_path), plant)
    (message,) = set(said)
    what = "gradient of the output" if backward else "output"
    rank = topology.rank(0, dp_rank, 0)
    place = f"rank {rank} (pp 0, dp {dp_rank}, tp 0)"
    assert f"The first nan is in the {what} of 3.attention, on {place}, in micro-batch 1" in message
    assert message.startswith(f"iteration {BAD_STEP}: ")
    assert ("the loss is nan" in message) is not backward
    document = 10 * ((BAD_STEP - 1) * 2 + BAD_MICRO_BATCH) + dp_rank
    assert f"It read data/x document {document} (tokens 3 to 20); " in message
    assert f"last checkpoint, {tmp_path}/global_step1." in message


@pytest.mark.parametrize(
    ("topology", "values"),
    [(Topology(), {"pipe_parallel_size": 0}), (Topology(pp=2, tp=2), {}), (Topology(dp=2), {})],
)
def test_a_weight_that_was_bad_is_named_and_no_document(
    world: World, tmp_path: Path, topology: Topology, values: dict[str, Any]
) -> None:
    plant = {"weight": "4.mlp.linear1.weight"}
    said = world.run(topology.world_size, run, topology, values, str(tmp_path), plant)
    (message,) = set(said)
    rank = topology.rank(topology.pp - 1, 0, 0)
    assert f"The weight 4.mlp.linear1.weight itself holds nan, on rank {rank} (" in message
    assert "document" not in message
    assert message.endswith("There is no checkpoint to go back to.")


@pytest.mark.parametrize(
    "name", ["0.word_embeddings", "3.input_layernorm", "3.attention.dense", "4.mlp.linear2"]
)
@pytest.mark.parametrize("topology", [Topology(), Topology(pp=2, tp=2)])
def test_whatever_overflows_is_named(
    world: World, tmp_path: Path, name: str, topology: Topology
) -> None:
    values = {"zero_optimization": {"stage": 0}}
    plant = {"huge": f"{name}.weight"}
    (message,) = set(world.run(topology.world_size, run, topology, values, str(tmp_path), plant))
    found = name if name != "0.word_embeddings" else "2.input_layernorm"  # squares the table's 3e38
    assert f" is in the output of {found}, on rank" in message


class Fake:
    """An engine that need not be looked at."""


def _steps(guard: Guard, steps: list[TrainStep]) -> int:
    """How many it takes before the guard stops."""
    for number, step in enumerate(steps, start=1):
        try:
            guard.check(number, step)
        except DivergenceError:
            return number
    return 0


def test_float16_may_overflow_fifty_times_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "first_fault", lambda *args: None)
    groups = ProcessGroups.single()
    good = TrainStep(2.0, 1.0, False, 8.0)
    bad = TrainStep(2.0, math.inf, True, 4.0)
    loader: Loader = Text(groups, 1)  # type: ignore[assignment]

    def guard() -> Guard:
        return Guard(config_of(), groups, Fake(), loader)  # type: ignore[arg-type]

    assert _steps(guard(), [good] * 60) == 0
    assert _steps(guard(), [bad] * 60) == 50
    assert _steps(guard(), [bad] * 49 + [good] + [bad] * 49) == 0
    with pytest.raises(DivergenceError, match=r"50 steps in a row .* loss scale is down to 4"):
        one = guard()
        for number in range(1, 51):
            one.check(number, bad)
    full = TrainStep(2.0, math.nan, False, None)  # any other precision
    assert _steps(guard(), [good, full]) == 2
    with pytest.raises(DivergenceError, match=r"has no such value on any one rank.* It read data"):
        guard().check(1, full)
