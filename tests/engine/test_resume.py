"""A resumed run is the uninterrupted run, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.engine.build import build_engine
from neox.errors import CheckpointError
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import batches
from tests.models import VOCAB, config_of
from tests.world import World

DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def run(rank: int, topology: Topology, values: dict[str, Any], folder: str) -> list[float]:
    """Four steps, saving after two; then the last two again from the checkpoint."""
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        **{"pipe_parallel_size": topology.pp, **values},
    )
    engine = build_engine(config, groups, VOCAB)
    source = batches(config, groups)
    for iteration in (1, 2):
        engine.train_batch(source, iteration, 0.01)
    if rank == 0:
        Path(folder).mkdir()
    groups.barrier()
    engine.save(Path(folder), {"iteration": 2, "note": "kept"})
    uninterrupted = [engine.train_batch(source, iteration, 0.01).loss for iteration in (3, 4)]

    resumed = build_engine(config, groups, VOCAB, Checkpoint.open(Path(folder)))
    assert resumed.load_optimizer(Checkpoint.open(Path(folder)), Path(folder))["note"] == "kept"
    source = batches(config, groups)
    for _ in range(2 * config.gradient_accumulation_steps):
        next(source)
    assert [resumed.train_batch(source, i, 0.01).loss for i in (3, 4)] == uninterrupted
    return uninterrupted


@pytest.mark.parametrize(
    ("topology", "values"),
    [
        (Topology(), DROPOUT),
        (Topology(pp=2, tp=2), DROPOUT),
        (Topology(dp=2), {"precision": "bfloat16"}),
        (Topology(tp=2), {"pipe_parallel_size": 0}),
    ],
    ids=["one", "pp2tp2", "dp2bf16", "tp2_no_pipeline"],
)
def test_resumed_equals_uninterrupted(
    world: World, tmp_path: Path, topology: Topology, values: dict[str, Any]
) -> None:
    losses = world.run(topology.world_size, run, topology, values, str(tmp_path / "global_step2"))
    assert losses[0][0] != losses[0][1]


def load_hostile(rank: int, folder: str) -> None:
    groups = initialize(Topology(), "gloo", torch.device("cpu"))
    config = config_of(zero_optimization={"stage": 1})
    engine = build_engine(config, groups, VOCAB)
    Path(folder).mkdir()
    engine.save(Path(folder), {})
    (victim,) = Path(folder).glob("zero_pp_rank_*")
    torch.save({"optimizer_state_dict": _Hostile(str(Path(folder) / "ran"))}, victim)
    engine.load_optimizer(Checkpoint.open(Path(folder)), Path(folder))


class _Hostile:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_in_the_optimizer_state_does_not_run(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    with pytest.raises(CheckpointError, match="was refused"):
        world.run(1, load_hostile, str(folder))
    assert not (folder / "ran").exists()
