"""Genuine upstream checkpoints, of both naming eras and residuals, give upstream's logits.

Each also in the form of pipe_parallel_size 0: one mp_rank file a shard, no layer files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neox.checkpoint.sources import LayerFiles, model_file
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


def as_model_files(folder: Path, target: Path) -> None:
    """The layer files of `folder` as upstream's pipe_parallel_size 0 would have written them."""
    source = LayerFiles(folder)
    target.mkdir(parents=True)
    for rank in range(source.tp):
        module = {
            f"sequential.{index}.{name}": tensor
            for index in source.indices
            for name, tensor in torch.load(source.files(index)[rank], weights_only=True).items()
        }
        torch.save({"module": module, "iteration": 20}, model_file(target, rank))


@pytest.fixture(scope="module")
def checkpoints(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The folders of each checkpoint, in its two forms."""
    directory = tmp_path_factory.mktemp("model_files")
    folders = {}
    for name in CHECKPOINTS:
        layered = shared / "upstream/checkpoints" / name / "global_step20"
        as_model_files(layered, directory / name)
        folders[name] = [str(layered), str(directory / name)]
    return folders


def worst_differences(
    rank: int, shared: str, checkpoints: dict[str, list[str]], topology: Topology
) -> dict[str, float]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    upstream = Path(shared) / "upstream"
    sequences = np.load(upstream / "ref" / "seqs.npz")
    tokens = torch.from_numpy(sequences[sequences.files[0]].astype(np.int64))
    worst = {}
    for name, folder in [(name, each) for name, both in checkpoints.items() for each in both]:
        reference, values = CHECKPOINTS[name]
        config = from_dict(
            {
                **small_config(upstream),
                **values,
                "load": folder,
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
            worst[folder] = (logits - expected).abs().max().item()
    return worst


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)], ids=lambda n: str(n)
)
def test_logits_at_every_grid(
    world: World, shared: Path, checkpoints: dict[str, list[str]], tp: int, pp: int
) -> None:
    topology = Topology(pp=pp, tp=tp)
    *_, last = world.run(topology.world_size, worst_differences, str(shared), checkpoints, topology)
    assert len(last) == 2 * len(CHECKPOINTS)
    assert max(last.values()) < 1e-5, last
