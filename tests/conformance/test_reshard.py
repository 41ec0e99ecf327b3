"""Genuine upstream checkpoints cut 2 -> 1 -> 4 -> 2: upstream's logits at every step and grid, and
in the end the files that they were, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import choose_rows, reshard
from neox.config import NeoXConfig, from_dict
from neox.inference.load import load_model
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from tests.conformance.small import small_config
from tests.conformance.test_checkpoints import CHECKPOINTS
from tests.world import World

GRIDS = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
SIZES = {name: (2, 1, 4, 2) if name == "ckpt_mp1pp1" else (1, 4, 2) for name in CHECKPOINTS}


def config_at(upstream: Path, name: str, tp: int, pp: int = 1, load: str = "") -> NeoXConfig:
    _, values = CHECKPOINTS[name]
    grid = {"model_parallel_size": tp, "pipe_parallel_size": pp, "load": load}
    return from_dict({**small_config(upstream), **values, **grid}, world_size=tp * pp)


@pytest.fixture(scope="module")
def resharded(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each checkpoint, the directory after each step."""
    upstream, output = shared / "upstream", tmp_path_factory.mktemp("resharded")
    directories: dict[str, list[str]] = {}
    for name, sizes in SIZES.items():
        checkpoint = Checkpoint.open(upstream / "checkpoints" / name)
        directories[name] = []
        for step, tp in enumerate(sizes):
            config = config_at(upstream, name, tp)
            rows = choose_rows(checkpoint, config, None, None)
            directory = output / name / str(step)
            reshard(checkpoint, directory, config, rows)
            checkpoint = Checkpoint.open(directory)
            directories[name].append(str(directory))
    return directories


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    paths = sorted(folder.glob("layer_*"))
    return {path.name: torch.load(path, weights_only=True) for path in paths}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_comes_back(shared: Path, resharded: dict[str, list[str]], name: str) -> None:
    first, *_ = steps = [Path(directory) / "global_step20" for directory in resharded[name]]
    genuine = shared / "upstream/checkpoints" / name / "global_step20"
    # The checkpoint of one shard is first cut in two, and comes back to one on the way.
    pairs = [(first, steps[-1]), (genuine, steps[1])]
    if name != "ckpt_mp1pp1":
        pairs = [(genuine, steps[-1])]
    for start, end in pairs:
        expected, found = files(start), files(end)
        assert expected.keys() == found.keys()
        for file, tensors in expected.items():
            assert tensors.keys() == found[file].keys()
            for key, tensor in tensors.items():
                assert torch.equal(tensor, found[file][key]), (file, key)


def worst_differences(
    rank: int, shared: str, resharded: dict[str, list[str]], topology: Topology
) -> dict[str, float]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    upstream = Path(shared) / "upstream"
    tokens = torch.from_numpy(np.load(upstream / "ref" / "seqs.npz")["tokens"])
    worst = {}
    for name, directory in [(name, each) for name, all in resharded.items() for each in all]:
        config = config_at(upstream, name, topology.tp, topology.pp, directory)
        logits = load_model(config, groups)(tokens)
        if logits is not None:
            reference = np.load(upstream / "ref" / f"ref_{CHECKPOINTS[name][0]}.npz")["logits"]
            worst[directory] = (logits - torch.from_numpy(reference)).abs().max().item()
    return worst


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=lambda n: str(n))
def test_logits_at_every_grid_after_every_step(
    world: World, shared: Path, resharded: dict[str, list[str]], tp: int, pp: int
) -> None:
    topology = Topology(pp=pp, tp=tp)
    *_, last = world.run(topology.world_size, worst_differences, str(shared), resharded, topology)
    assert len(last) == sum(map(len, SIZES.values()))
    assert max(last.values()) < 1e-5, last
