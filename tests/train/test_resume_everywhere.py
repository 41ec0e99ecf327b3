"""A run that goes on from any of its steps repeats the rest of itself, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.parallel.topology import Topology
from tests.train.test_evaluations import folder, train
from tests.world import World

__all__ = ["folder"]

STEPS = 5
SEQUENTIAL = {"pipe_parallel_size": 0}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        (Topology(), zero(1)),
        (Topology(), SEQUENTIAL | zero(0)),
        (Topology(pp=2, tp=2), zero(0)),
        (Topology(dp=2), SEQUENTIAL | zero(2)),
        (Topology(dp=2, tp=2), zero(1) | {"precision": "bfloat16"}),
    ],
    ids=["1", "pp0 ZeRO 0", "tp2 pp2 ZeRO 0", "pp0 dp2 ZeRO 2", "tp2 dp2 bf16"],
)
def test_every_step_is_a_place_to_resume(
    world: World, folder: Path, grid: Topology, values: dict[str, Any]
) -> None:
    values = values | {"train_iters": STEPS, "lr_decay_iters": STEPS, "char_level_ppl": True}
    whole = train(world, folder, "whole", grid, checkpoint_factor=1, **values)
    assert list(whole) == list(range(1, STEPS + 1))
    for step in range(1, STEPS):
        rows = train(
            world,
            folder,
            f"from{step}",
            grid,
            load=f"{folder}/whole",
            iteration=step,
            checkpoint_factor=STEPS,
            **values,
        )
        assert list(rows) == list(range(step + 1, STEPS + 1))
        for iteration, row in rows.items():
            exact = {key for key in row if not key.startswith(("runtime/", "time"))}
            assert {key: row[key] for key in exact} == {
                key: whole[iteration][key] for key in exact
            }, (step, iteration)
        last = f"global_step{STEPS}"
        for path in (folder / f"whole/{last}").glob("layer_*.pt"):
            one, other = (
                torch.load(p, weights_only=True)
                for p in (path, folder / f"from{step}/{last}/{path.name}")
            )
            assert all(torch.equal(one[name], other[name]) for name in one), (step, path.name)
