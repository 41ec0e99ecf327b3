"""checkpoint_validation_with_forward_pass: what was saved is what is loaded, or the run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.files import save_file
from neox.checkpoint.manifest import FORWARD_PASS, Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import reshard
from neox.errors import CheckpointError
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from tests.train.test_evaluations import folder, run_training, settings
from tests.world import World

__all__ = ["folder"]

CHECKED = {"checkpoint_validation_with_forward_pass": True, "exit_interval": 2}
UNCHECKED = {"checkpoint_validation_with_forward_pass": False}
SEQUENTIAL = {"pipe_parallel_size": 0}


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/global_step2" / FORWARD_PASS).read_text())


def run(world: World, folder: Path, grid: Topology, **values: Any) -> str:
    """Train; what rank 0 said about the forward pass."""
    (said, *_) = world.run(grid.world_size, listen, str(folder), grid, {**CHECKED, **values})
    return said


def listen(rank: int, folder: str, grid: Topology, values: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run_training(rank, folder, "run", grid, values)
    return "\n".join(line for line in said.getvalue().splitlines() if "forward_pass" in line)


@pytest.mark.parametrize(
    ("grid", "values"),
    [
        (Topology(), {}),
        (Topology(), SEQUENTIAL),
        (Topology(pp=2, tp=2), {"precision": "bfloat16"}),
        (Topology(tp=2, dp=2), SEQUENTIAL | {"zero_optimization": {"stage": 1}}),
    ],
    ids=["1", "pp0", "tp2 pp2 bf16", "tp2 dp2 pp0"],
)
def test_the_same_grid_computes_the_same_bits(
    world: World, folder: Path, grid: Topology, values: dict[str, Any]
) -> None:
    assert run(world, folder, grid, **values) == ""  # there was nothing to compare
    before = saved(folder)
    said = run(world, folder, grid, exit_interval=4, **values)
    assert said.endswith("global_step2 computes what it did when it was saved, bit for bit")
    assert saved(folder) == before


def test_another_grid_computes_nearly_the_same(world: World, folder: Path) -> None:
    run(world, folder, Topology(pp=2))
    said = run(world, folder, Topology(tp=2), exit_interval=3)
    assert "when it was saved, to " in said and said.endswith(" nats, of 0.0001 allowed")
    said = run(world, folder, Topology(), iteration=2, precision="bfloat16")
    assert "saved in float32 and the model is in bfloat16, so no forward pass" in said


def test_another_number_of_shards_keeps_it(world: World, folder: Path, capsys: Any) -> None:
    run(world, folder, Topology(tp=2))
    config = settings(folder, "run", Topology(), CHECKED)
    reshard(Checkpoint.open(folder / "run"), folder / "whole", config, 280)
    load_model(dataclasses.replace(config, load=str(folder / "whole")), ProcessGroups.single())
    assert (
        "whole/global_step2 computes what it did when it was saved, to" in capsys.readouterr().out
    )


def test_weights_held_otherwise(world: World, folder: Path, capsys: Any) -> None:
    run(world, folder, Topology())
    for values, said in (
        ({}, "computes what it did when it was saved, to"),  # packed: by other kernels
        ({"quantize": "int8"}, "they are held in int8, which changes what they compute, so no"),
        ({"load_in_8bit": True}, "they are held in 8bit, which changes what they compute, so no"),
    ):
        config = settings(folder, "run", Topology(), CHECKED)
        load_model(dataclasses.replace(config, **values), ProcessGroups.single())
        assert said in capsys.readouterr().out


def test_another_function_is_refused(world: World, folder: Path) -> None:
    """One that no checksum tells, since the file is what was written."""
    grid = Topology(tp=2)
    run(world, folder, grid)
    step = folder / "run/global_step2"
    path = step / "layer_02-model_01-model_states.pt"
    tensors = torch.load(path, weights_only=True)
    tensors["mlp.linear1.weight"][0, 0] += 1e-3
    manifest = Manifest.read(step)
    assert manifest is not None
    files = {**manifest.files, path.name: save_file(tensors, path)}
    dataclasses.replace(manifest, files=files).write()

    with pytest.raises(CheckpointError, match=r"global_step2 do not compute .* differ by \d"):
        run(world, folder, grid, exit_interval=4)
    assert not (folder / "run/global_step4").exists()
    tensors["mlp.linear1.weight"] += 0.1
    files = {**manifest.files, path.name: save_file(tensors, path)}
    dataclasses.replace(manifest, files=files).write()
    with pytest.raises(CheckpointError, match=r"and may differ by 0\.0001"):  # at another grid
        load_model(settings(folder, "run", Topology(), CHECKED), ProcessGroups.single())
    run(world, folder, grid, exit_interval=4, **UNCHECKED)
    assert (folder / "run/global_step4").exists()


def test_a_checkpoint_without_one_is_used_with_a_warning(world: World, folder: Path) -> None:
    run(world, folder, Topology(), **UNCHECKED)
    assert not (folder / "run/global_step2" / FORWARD_PASS).exists()
    said = run(world, folder, Topology(), exit_interval=3)
    assert said.startswith("warning: ") and "without a forward pass, so none is compared" in said
