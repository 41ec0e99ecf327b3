"""Training at every grid is the same training: losses, gradient norms and weights, step by step.

All grids start from the same seed, so these tests also hold initialisation and saving to account:
what is compared at the end is read back from each grid's layer files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.data.loaders import Batch
from neox.engine.build import build_engine
from neox.errors import ConfigError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import VOCAB, config_of, model_layers, tokens
from tests.world import World

STEPS = 3

# With Adam's usual 1e-8 a gradient that is zero but for rounding (a key's bias, which softmax does
# not see) still moves its weight by the whole rate. This epsilon makes such noise stay noise.
OPTIMIZER = {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-3}}


def batches(config: Any, groups: ProcessGroups):
    """Global batches of 4 sequences x 2 micro-steps, cut for this replica."""
    size = config.train_micro_batch_size_per_gpu
    for step in range(100):
        text = tokens(batch=4, length=17, seed=step)
        mask = torch.ones(4, 16)
        mask[:, ::5] = 0
        mine = slice(groups.dp_rank * size, (groups.dp_rank + 1) * size)
        yield Batch(text[mine, :-1], text[mine, 1:], mask[mine])


def train(
    rank: int, topology: Topology, values: dict[str, Any], folder: str
) -> tuple[list[float], list[float], float]:
    """Losses and gradient norms of a few steps, then a validation loss; saves at the end."""
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        **{"pipe_parallel_size": topology.pp, **values},
        train_micro_batch_size_per_gpu=4 // topology.dp,
        optimizer=OPTIMIZER,
    )
    engine = build_engine(config, groups, VOCAB)
    source = batches(config, groups)
    steps = [engine.train_batch(source, i, 0.01) for i in range(1, STEPS + 1)]
    validation = engine.eval_batch(source)
    if rank == 0:
        Path(folder).mkdir()
    groups.barrier()
    engine.save(Path(folder), {"iteration": STEPS})
    return [s.loss for s in steps], [s.grad_norm or 0.0 for s in steps], validation


def whole_weights(folder: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    single = ProcessGroups.single()
    return {
        f"{layer.index}.{name}": tensor
        for layer in model_layers(config_of(**values), single)
        if layer.has_file
        for name, tensor in checkpoint.read(layer, single).items()
    }


def check(
    world: World, tmp_path: Path, values: dict[str, Any], grids: list[tuple[int, ...]]
) -> None:
    results = {}
    for pp, dp, tp in [(1, 1, 1), *grids]:
        topology = Topology(pp, dp, tp)
        folder = tmp_path / f"global_step{len(results)}"
        by_rank = world.run(topology.world_size, train, topology, values, str(folder))
        assert all(result == by_rank[0] for result in by_rank), "ranks disagree"
        results[pp, dp, tp] = (by_rank[0], whole_weights(folder, values))
    (losses, norms, validation), weights = results.pop((1, 1, 1))
    assert losses[0] != losses[1]
    for grid, ((got, got_norms, got_validation), got_weights) in results.items():
        assert got == pytest.approx(losses, abs=1e-5), grid
        assert got_norms == pytest.approx(norms, rel=1e-4), grid
        assert got_validation == pytest.approx(validation, abs=1e-5), grid
        for name, tensor in weights.items():
            assert_close(
                got_weights[name],
                tensor,
                atol=1e-5,
                rtol=1e-4,
                msg=lambda text, at=f"{grid} {name}": f"{at}: {text}",
            )


def test_parallel_residual(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, {}, [(2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2)])


def test_sequential_residual_and_recomputed_activations(world: World, tmp_path: Path) -> None:
    values = {"gpt_j_residual": False, "checkpoint_activations": True}
    check(world, tmp_path, values, [(2, 1, 2)])


def test_tied_embeddings_on_two_stages(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, {"no_weight_tying": False, "pos_emb": "learned"}, [(2, 1, 2)])


def test_without_a_pipeline(world: World, tmp_path: Path) -> None:
    values = {"pipe_parallel_size": 0, "zero_optimization": {"stage": 2}}
    check(world, tmp_path, values, [(1, 1, 2), (1, 2, 1)])


def test_grouped_queries_and_gated_mlp(world: World, tmp_path: Path) -> None:
    values = {
        "num_kv_heads": 2,
        "activation": "swiglu",
        "intermediate_size": 96,
        "norm": "rmsnorm",
    }
    check(world, tmp_path, values, [(2, 1, 2)])


@pytest.mark.parametrize("method", ["parameters", "uniform"])
def test_other_partitions(world: World, tmp_path: Path, method: str) -> None:
    check(world, tmp_path, {"pipe_partition_method": method}, [(2, 1, 1)])


def build(rank: int, topology: Topology, values: dict[str, Any]) -> None:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(world_size=topology.world_size, pipe_parallel_size=topology.pp, **values)
    build_engine(config, groups, VOCAB)


def test_a_stage_of_nothing_but_matrices_is_refused(world: World) -> None:
    """A large embedding fills the first one. The gradient's norm would wait for ever for it."""
    values = {
        "num_layers": 4,
        "pos_emb": "learned",
        "max_position_embeddings": 1024,
        "pipe_partition_method": "parameters",
    }
    with pytest.raises(ConfigError, match=r"parameters leaves stage 0 of 4 without.*Use type:"):
        world.run(4, build, Topology(pp=4), values)
