"""Genuine upstream checkpoints, of both naming eras and residuals, give upstream's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neox.config import from_dict
from neox.inference.load import load_model
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import small_config
from tests.world import World

# checkpoint -> (its reference, keys that differ from small.yml)
CHECKPOINTS = {
    "ckpt_mp1pp1": ("mp1pp1", {}),
    "ckpt_mp2pp1": ("mp2pp1", {}),
    "legacy_names_mp2": ("mp2pp1", {}),
    "sequential_residual_mp2": ("sequential_residual_mp2", {"gpt_j_residual": False}),
}


def worst_differences(rank: int, shared: str, topology: Topology) -> dict[str, float]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    upstream = Path(shared) / "upstream"
    sequences = np.load(upstream / "ref" / "seqs.npz")
    tokens = torch.from_numpy(sequences[sequences.files[0]].astype(np.int64))
    worst = {}
    for name, (reference, values) in CHECKPOINTS.items():
        config = from_dict(
            {
                **small_config(upstream),
                **values,
                "load": str(upstream / "checkpoints" / name),
                "model_parallel_size": topology.tp,
                "pipe_parallel_size": topology.pp,
            },
            world_size=topology.world_size,
        )
        logits = load_model(config, groups)(tokens)
        if logits is not None:
            expected = torch.from_numpy(
                np.load(upstream / "ref" / f"ref_{reference}.npz")["logits"]
            )
            worst[name] = (logits - expected).abs().max().item()
    return worst


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)], ids=lambda n: str(n)
)
def test_logits_at_every_grid(world: World, shared: Path, tp: int, pp: int) -> None:
    topology = Topology(pp=pp, tp=tp)
    *_, last = world.run(topology.world_size, worst_differences, str(shared), topology)
    assert last.keys() == CHECKPOINTS.keys()
    assert max(last.values()) < 1e-5, last
