"""ZeRO 3: weights spread over the replicas are saved whole, and their state goes on anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.parallel.topology import Topology
from tests.engine.test_elastic import go_on, start, whole_state
from tests.world import World

# The threshold: small weights would stay whole everywhere, and the test model has only such.
SHARDED = {
    "pipe_parallel_size": 0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
TIED = {"no_weight_tying": False, "pos_emb": "learned", "rotary_pct": 1.0, "num_layers": 1}
BF16 = {"precision": "bfloat16"}
STAGE_1 = {"zero_optimization": {"stage": 1}}
STAGE_2 = {"zero_optimization": {"stage": 2}, "pipe_parallel_size": 0}


def check(
    world: World,
    folder: Path,
    source: tuple[Topology, dict[str, Any]],
    target: tuple[Topology, dict[str, Any]],
    tolerance: float,
) -> dict[str, Tensor]:
    """A run that resumes at `target` has the state it was given, and goes on like its `source`."""
    saved, again = folder / "global_step3", folder / "again" / "global_step3"
    again.parent.mkdir()
    (topology, values), (other, others) = source, target
    (expected, *_) = world.run(topology.world_size, start, topology, values, str(saved), 3)
    results = world.run(other.world_size, go_on, other, others, str(saved), str(again), 3)
    for result in results:
        assert result == pytest.approx(expected, abs=tolerance)
    before, after = whole_state(saved, values), whole_state(again, others)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    return before


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_resumed_at_the_same_grid_it_goes_on_exactly(
    world: World, tmp_path: Path, precision: dict[str, Any]
) -> None:
    at = (Topology(dp=2), SHARDED | precision)
    state = check(world, tmp_path, at, at, tolerance=0)
    names = {path.name for path in (tmp_path / "global_step3").iterdir()}
    assert "mp_rank_00_model_states.pt" in names
    assert not {name for name in names if name.startswith("zero") and "model_states" in name}
    assert any(name.endswith("exp_avg_sq") and state[name].any() for name in state)


def test_its_weights_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    # Vocabulary 64 and width 32 divide by 2; one process has nothing to divide.
    ours, single = tmp_path / "global_step3", tmp_path / "global_step4"
    world.run(4, start, Topology(dp=2, tp=2), SHARDED, str(ours), 0)
    world.run(1, start, Topology(), STAGE_1, str(single), 0)
    whole = whole_state(single, {})
    for name, tensor in whole_state(ours, {}).items():
        assert_close(tensor, whole[name], atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((Topology(dp=2), SHARDED), (Topology(dp=2), STAGE_2)),
        ((Topology(dp=2, tp=2), SHARDED), (Topology(pp=2), STAGE_1)),
        ((Topology(pp=2), STAGE_1), (Topology(dp=2, tp=2), SHARDED)),
        ((Topology(dp=2), SHARDED), (Topology(dp=4), SHARDED)),
        ((Topology(dp=2), SHARDED | TIED), (Topology(tp=2), SHARDED | TIED)),
        ((Topology(), {"zero_optimization": {"stage": 0}}), (Topology(dp=2), SHARDED)),
        ((Topology(dp=2), SHARDED), (Topology(), {"zero_optimization": {"stage": 0}})),
    ],
    ids=["to 2", "to a pipeline", "from a pipeline", "to 4", "tied", "from 0", "to 0"],
)
def test_state_goes_on_at_another_grid_or_stage(
    world: World,
    tmp_path: Path,
    source: tuple[Topology, dict[str, Any]],
    target: tuple[Topology, dict[str, Any]],
) -> None:
    check(world, tmp_path, source, target, tolerance=1e-5)


def test_weights_that_do_not_divide_by_the_replicas(world: World, tmp_path: Path) -> None:
    """32 numbers over 3 replicas: 11, 11 and 10, and one that fills up."""
    saved, again = tmp_path / "global_step3", tmp_path / "again"
    world.run(3, start, Topology(dp=3), SHARDED, str(saved), 0)
    world.run(2, go_on, Topology(dp=2), SHARDED, str(saved), str(again), 0)
    before, after = whole_state(saved, {}), whole_state(again, {})
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(tensor.any() for name, tensor in before.items() if name.endswith("exp_avg_sq"))
