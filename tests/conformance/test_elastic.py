"""Runs that change their grid follow upstream's curve, and go on from its optimizer state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file
from neox.config import from_dict
from neox.engine.plain_state import PlainState
from neox.entrypoints.train import main
from neox.model.layout import transformer_layout
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import small_config
from tests.world import World


def run_training(
    rank: int, upstream: str, folder: str, topology: Topology, values: dict[str, Any]
) -> None:
    config = from_dict(
        {
            **small_config(Path(upstream)),
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "gradient_accumulation_steps": 2 // topology.dp,
            "log_dir": f"{folder}/logs",
            **values,
        },
        world_size=topology.world_size,
    )
    main(config, initialize(topology, "gloo", torch.device("cpu")))


def train(
    world: World, shared: Path, folder: Path, topology: Topology, **values: Any
) -> dict[int, float]:
    """The losses so far of the run whose folder it is, by iteration."""
    arguments = (str(shared / "upstream"), str(folder), topology, values)
    world.run(topology.world_size, run_training, *arguments)
    rows = map(json.loads, (folder / "logs/metrics.jsonl").read_text().splitlines())
    return {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}


def test_a_run_that_changes_its_grid_twice_follows_upstreams_curve(
    world: World, shared: Path, tmp_path: Path
) -> None:
    step0 = shared / "upstream/checkpoints/ckpt_mp1pp1/global_step0"
    run = tmp_path / "run"
    shutil.copytree(step0, run / step0.name, ignore=shutil.ignore_patterns("configs"))
    own = {"load": str(run), "save": str(run), "checkpoint_factor": 5}

    train(world, shared, tmp_path, Topology(tp=2, pp=2), **own, exit_interval=5)
    train(world, shared, tmp_path, Topology(pp=2, dp=2), **own, exit_interval=10)
    losses = train(world, shared, tmp_path, Topology(), **own)

    curve = json.loads((shared / "upstream/curves/train_mp1pp1.json").read_text())
    assert losses == pytest.approx(
        {step["iteration"]: step["lm_loss"] for step in curve["iters"]}, abs=1e-5
    )


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2)], ids=["one", "tp2pp2"])
def test_upstreams_own_optimizer_state_goes_on(
    world: World, shared: Path, tmp_path: Path, topology: Topology
) -> None:
    """Our run from upstream's step 0 is its run; after step 20 they go on alike."""
    values: dict[str, Any] = {
        "load": str(shared / "upstream/checkpoints/ckpt_mp1pp1"),
        "train_iters": 24,
        "lr_decay_iters": 20,
        "save": str(tmp_path / "save"),
        "extra_save_iters": [24],
    }
    kept = train(world, shared, tmp_path / "kept", topology, **values)
    assert list(kept) == [21, 22, 23, 24]
    shutil.rmtree(tmp_path / "save")
    whole = train(world, shared, tmp_path / "whole", Topology(), **values, iteration=0)
    assert [whole[i] for i in kept] == pytest.approx(list(kept.values()), abs=1e-5)


def test_shards_of_upstreams_optimizer_state_are_joined(shared: Path) -> None:
    checkpoint = Checkpoint.open(shared / "upstream/checkpoints/ckpt_mp2pp1")
    layout = transformer_layout(from_dict(small_config(shared / "upstream"), world_size=1))
    states = [
        load_model_file(checkpoint.folder / f"mp_rank_{rank:02d}_model_states.pt")["optimizer"][
            "state"
        ]
        for rank in range(2)
    ]
    # Upstream's numbers: 0 is the embedding's weight, 1 to 4 the first layer's matrices, 18 to 25
    # its norms and biases.
    for name, number, dim in (
        ("attention.query_key_value.weight", 1, 0),
        ("mlp.linear2.weight", 4, 1),
        ("mlp.linear1.bias", 24, 0),
    ):
        state = PlainState(checkpoint).of((2, name), layout[name])
        joined = torch.cat([ranks[number]["exp_avg"] for ranks in states], dim)
        assert torch.equal(state.whole(layout[name])["exp_avg"], joined)
        assert state.step == 20
    name = "attention.dense.bias"  # a summand on each rank, whose moments are those of the sum
    moment = PlainState(checkpoint).of((2, name), layout[name]).whole(layout[name])["exp_avg_sq"]
    assert torch.equal(moment, states[0][21]["exp_avg_sq"])
