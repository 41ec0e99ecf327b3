"""Optimizer state saved at one grid goes on at any other as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import optimizer_files
from neox.engine.base import Engine
from neox.engine.build import build_engine
from neox.engine.saved_state import ZeroState
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import OPTIMIZER, batches
from tests.models import VOCAB, config_of, model_layers
from tests.world import World

BEFORE = 3  # steps that the first run takes before it saves
NO_PIPELINE = {"pipe_parallel_size": 0}


def engine_of(
    topology: Topology, values: dict[str, Any], checkpoint: Checkpoint | None = None
) -> tuple[Engine, Any, ProcessGroups]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    settings = {"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, **values}
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        train_micro_batch_size_per_gpu=4 // topology.dp,
        **settings,
    )
    return build_engine(config, groups, VOCAB, checkpoint), config, groups


def save(engine: Engine, folder: Path, groups: ProcessGroups) -> None:
    if groups.rank == 0:
        folder.mkdir()
    groups.barrier()
    engine.save(folder, {"iteration": BEFORE})


def start(
    rank: int, topology: Topology, values: dict[str, Any], folder: str, steps: int
) -> list[float]:
    """Train, save, and go on for `steps`: the losses from there."""
    engine, config, groups = engine_of(topology, values)
    source = batches(config, groups)
    for iteration in range(1, BEFORE + 1):
        engine.train_batch(source, iteration, 0.01)
    save(engine, Path(folder), groups)
    return [engine.train_batch(source, BEFORE + i, 0.01).loss for i in range(1, steps + 1)]


def go_on(
    rank: int, topology: Topology, values: dict[str, Any], folder: str, again: str, steps: int
) -> list[float]:
    """Resume, save at once into `again`, and go on for `steps`."""
    checkpoint = Checkpoint.open(Path(folder))
    engine, config, groups = engine_of(topology, values, checkpoint)
    assert engine.load_optimizer(checkpoint, Path(folder).parent)["iteration"] == BEFORE
    save(engine, Path(again), groups)
    source = batches(config, groups)
    for _ in range(BEFORE * config.gradient_accumulation_steps):
        next(source)
    return [engine.train_batch(source, BEFORE + i, 0.01).loss for i in range(1, steps + 1)]


def whole_state(folder: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter's whole state by layer, name and kind."""
    layers = model_layers(config_of(**values), ProcessGroups.single())
    files = optimizer_files(folder, Checkpoint.open(folder).tp)
    assert files is not None
    saved = ZeroState(folder, files, layers)
    found = {}
    for layer in layers:
        if layer.has_file:
            assert layer.layout is not None
            for name, layout in layer.layout.items():
                state = saved.of((layer.index, name), layout)
                for kind, tensor in state.whole(layout).items():
                    found[f"{layer.index}.{name}.{kind}"] = tensor
                found[f"{layer.index}.{name}.step"] = torch.tensor(state.step or 0.0)
    return found


def check(
    world: World,
    tmp_path: Path,
    values: dict[str, Any],
    source: tuple[Topology, dict[str, Any]],
    targets: list[tuple[Topology, dict[str, Any]]],
    steps: int = 3,
    abs: float = 1e-5,
) -> dict[str, Tensor]:
    topology, own = source
    folder = tmp_path / f"global_step{BEFORE}"
    losses = world.run(topology.world_size, start, topology, {**values, **own}, str(folder), steps)[
        0
    ]
    before = whole_state(folder, values)
    for number, (topology, own) in enumerate(targets):
        again = tmp_path / f"again{number}"
        arguments = (topology, {**values, **own}, str(folder), str(again), steps)
        got = world.run(topology.world_size, go_on, *arguments)[0]
        assert got == pytest.approx(losses, abs=abs), topology
        after = whole_state(again, values)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), (topology, name)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {folder.name} | {f"again{number}" for number in range(len(targets))}
    return before


def test_every_grid_of_four_ranks_and_one_rank(world: World, tmp_path: Path) -> None:
    grids = [Topology(), Topology(pp=4), Topology(tp=4), Topology(tp=2, dp=2), Topology(pp=2, dp=2)]
    state = check(
        world,
        tmp_path,
        {"num_layers": 4},
        (Topology(tp=2, pp=2), {}),
        [(topology, {}) for topology in grids],
        steps=20,
    )
    assert {name.rpartition(".")[2] for name in state} == {"fp32", "exp_avg", "exp_avg_sq", "step"}
    assert all(tensor == BEFORE for name, tensor in state.items() if name.endswith(".step"))
    moments = [tensor for name, tensor in state.items() if name.endswith(".exp_avg_sq")]
    assert all(moment.any() for moment in moments)
