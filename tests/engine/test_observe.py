"""Norms of single parameters are the whole model's at every grid, ZeRO stage and engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.engine.build import build_engine
from neox.engine.observe import Observation
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import OPTIMIZER, batches
from tests.models import VOCAB, config_of, model_layers
from tests.world import World

FLAGS = {
    "log_grad_norm": True,
    "log_grad_pct_zeros": True,
    "log_param_norm": True,
    "log_optimizer_states": True,
}
STEPS = 2
Rows = list[dict[str, float]]


def observe(
    rank: int, topology: Topology, values: dict[str, Any], folder: str | None = None
) -> tuple[Rows, Rows, list[float]]:
    """What was observed of each step, the times of its parts, and the engine's own norm."""
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(
        world_size=topology.world_size,
        **{
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "train_micro_batch_size_per_gpu": 4 // topology.dp,
            "optimizer": OPTIMIZER,
            **FLAGS,
            **values,
        },
    )
    engine = build_engine(config, groups, VOCAB)
    observation = Observation(engine, config)
    source = observation.batches(batches(config, groups))
    norms, timers, whole = [], [], []
    for iteration in range(1, STEPS + 1):
        observation.start()
        step = engine.train_batch(source, iteration, 0.01)
        timers.append(observation.timers())
        norms.append(observation.norms())
        whole.append(step.grad_norm or 0.0)
        engine.eval_batch(source)
    if folder is not None:
        engine.save(Path(folder), {"iteration": STEPS})
    return norms, timers, whole


@pytest.mark.parametrize("tied", [False, True])
def test_the_norms_of_one_process(world: World, tmp_path: Path, tied: bool) -> None:
    values = {"no_weight_tying": not tied, "zero_optimization": {"stage": 1}}
    ((norms, _, whole),) = world.run(1, observe, Topology(), values, str(tmp_path))
    single = ProcessGroups.single()
    layers = model_layers(config_of(**values), single)
    names = [f"{layer.index}.{n}" for layer in layers if layer.has_file for n in layer.layout]
    checkpoint = Checkpoint.open(tmp_path)
    weights = {
        f"{layer.index}.{name}": tensor
        for layer in layers
        if layer.has_file
        for name, tensor in checkpoint.read(layer, single).items()
    }
    for name in names:
        expected = float(torch.linalg.vector_norm(weights[name]))
        assert norms[-1][f"parameter_norms/{name}"] == pytest.approx(expected, rel=1e-6)
    for step, norm in zip(norms, whole, strict=True):
        squares = [step[f"gradient_norms/{name}"] ** 2 for name in names]
        assert sum(squares) ** 0.5 == pytest.approx(norm, rel=1e-5)
    clipping = min(1.0, 1.0 / (whole[0] + 1e-6))
    for number, name in enumerate(names):  # Adam's moments after its first step
        gradient = norms[0][f"gradient_norms/{name}"] * clipping
        moment = norms[0][f"optimizer_state_norms/{number}_exp_avg"]
        assert moment == pytest.approx(0.1 * gradient, rel=1e-4)
        assert f"optimizer_state_norms/{number}_exp_avg_sq" in norms[0]
    # The vocabulary is larger than the text: rows of the embedding that no token used.
    assert 0 < norms[0]["pct_grad_zeros/0.word_embeddings.weight"] < 100 or tied
    assert norms[0]["pct_grad_zeros/2.mlp.linear1.weight"] == 0
    kinds = ("gradient_norms", "pct_grad_zeros", "parameter_norms")
    expected_keys = {f"{kind}/{name}" for kind in kinds for name in names} | {
        f"optimizer_state_norms/{number}_{state}"
        for number in range(len(names))
        for state in ("exp_avg", "exp_avg_sq")
    }
    assert norms[0].keys() == expected_keys


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
GRIDS: list[tuple[Topology, dict[str, Any]]] = [
    (Topology(dp=2), {"zero_optimization": {"stage": 0}}),
    (Topology(dp=2), {"zero_optimization": {"stage": 1}}),
    (Topology(dp=2), {"zero_optimization": {"stage": 0}, "pipe_parallel_size": 0}),
    (Topology(dp=2), {"zero_optimization": {"stage": 1}, "pipe_parallel_size": 0}),
    (Topology(dp=2), {"zero_optimization": {"stage": 2}, "pipe_parallel_size": 0}),
    (Topology(dp=2), {"zero_optimization": {"stage": 3}, "pipe_parallel_size": 0}),
    (Topology(dp=2), {"zero_optimization": OFFLOADED, "pipe_parallel_size": 0}),
    (Topology(tp=2), {"sequence_parallel": True}),
    (Topology(pp=2, tp=2), {"zero_optimization": {"stage": 1}}),
    (Topology(pp=2, dp=2), {"zero_optimization": {"stage": 1}}),
    (Topology(tp=2, dp=2), {"zero_optimization": {"stage": 1}}),
    (Topology(pp=2, tp=2), {"zero_optimization": {"stage": 0}, "no_weight_tying": False}),
]


@pytest.mark.parametrize(("topology", "values"), GRIDS)
def test_every_grid_has_the_same_norms(
    world: World, topology: Topology, values: dict[str, Any]
) -> None:
    tying = {"no_weight_tying": values.get("no_weight_tying", True)}
    ((expected, _, _),) = world.run(1, observe, Topology(), tying)
    for norms, _, _ in world.run(topology.world_size, observe, topology, values):
        for step, reference in zip(norms, expected, strict=True):
            assert step.keys() == reference.keys()
            for key, value in reference.items():
                # A key's bias has no gradient but rounding: softmax does not see it.
                if key.startswith("pct_grad_zeros") and key.endswith("query_key_value.bias"):
                    continue
                assert step[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


def test_bfloat16_counts_each_gradient_once(world: World) -> None:
    values = {"precision": "bfloat16", "zero_optimization": {"stage": 1}}
    ((expected, _, _),) = world.run(1, observe, Topology(), values)
    for norms, _, _ in world.run(2, observe, Topology(dp=2), values):
        for key, value in expected[0].items():
            if key.startswith(("gradient_norms", "parameter_norms")):
                assert norms[0][key] == pytest.approx(value, rel=0.05, abs=2e-3), key


def test_parts_of_a_step_are_timed(world: World) -> None:
    timed = {"wall_clock_breakdown": True, **dict.fromkeys(FLAGS, False)}
    ((norms, timers, _),) = world.run(1, observe, Topology(), timed | {"pipe_parallel_size": 0})
    assert norms == [{}] * STEPS
    assert timers[0].keys() == {
        "forward", "backward", "backward-backward", "backward-allreduce", "optimizer",
        "batch generator",
    }  # fmt: skip
    assert all(0 < seconds < 60 for step in timers for seconds in step.values())
    assert timers[1]["backward-backward"] <= timers[1]["backward"]
    for _, timers, _ in world.run(2, observe, Topology(pp=2), timed):
        assert timers[1].keys() >= {"fwd", "bwd", "bwd_allreduce", "step", "train_batch"}
        whole = timers[1]["train_batch"]
        assert timers[1]["fwd"] + timers[1]["bwd"] + timers[1]["step"] < whole < 60
