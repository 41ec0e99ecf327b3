"""Damage, full disks and hostile files: never used, never run, and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox.checkpoint.manifest import MANIFEST, Manifest, digest
from neox.checkpoint.neox import Checkpoint, layer_file
from neox.checkpoint.sources import model_file
from neox.checkpoint.verify import verify
from neox.config import from_dict, load_config
from neox.entrypoints.train import main
from neox.errors import CheckpointError, ConfigError, DataError
from neox.inference.load import load_model
from neox.inference.logits import read_tokens
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.train import loop
from neox.train.start import find_start
from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE, config_of, write_model
from tests.small_disk import small_disk, small_files
from tests.world import World

SINGLE = ProcessGroups.single()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With whole checkpoints of the steps 2 and 4."""
    for iteration in (2, 4):
        write_model(tmp_path / "run", iteration)
    return tmp_path / "run"


def generate(directory: Path, **values: Any) -> None:
    load_model(config_of(load=str(directory), **values), SINGLE)


# Generating


def refused(directory: Path, path: Path, contents: bytes | None) -> str:
    """What generate.py says while `path` holds `contents`."""
    original = path.read_bytes()
    if contents is None:
        path.unlink()
    else:
        path.write_bytes(contents)
    with pytest.raises(CheckpointError) as raised:
        generate(directory)
    path.write_bytes(original)
    return str(raised.value)


def test_every_damage_of_what_is_read_is_named_and_another_checkpoint_told(directory: Path) -> None:
    folder = directory / "global_step4"
    draw = random.Random(0)
    for path in [*sorted(folder.glob("layer_*")), folder / MANIFEST]:
        contents = path.read_bytes()
        cases: list[bytes | None] = [contents[:length] for length in (0, 1, len(contents) - 1)]
        if path.name != MANIFEST:  # without one, a checkpoint of weights alone is like upstream's
            cases.append(None)
        for _ in range(20):
            flipped = bytearray(contents)
            flipped[draw.randrange(len(flipped))] ^= draw.randrange(1, 256)
            cases.append(bytes(flipped))
        for case in cases:
            said = refused(directory, path, case)
            assert str(path) in said, said
            assert said.endswith(f"whole is {directory}/global_step2: use --iteration 2."), said


def test_another_step_is_generated_from_only_when_told(directory: Path) -> None:
    layer_file(directory / "global_step4", 3, 0).write_bytes(b"")
    generate(directory, iteration=2)
    layer_file(directory / "global_step2", 3, 0).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"global_step2/layer_03.*No other .* is whole"):
        generate(directory, iteration=2)


def test_what_is_not_read_does_not_matter(directory: Path) -> None:
    (directory / "global_step4/configs/small.yml").unlink()
    generate(directory)


def test_every_flip_of_latest_is_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / "latest"
    original = path.read_bytes()
    for at in range(len(original)):
        for bit in range(8):
            flipped = bytearray(original)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                generate(directory)
                said = capsys.readouterr().out
            except CheckpointError as error:
                said = str(error)
            assert "`latest`" in said and "--iteration N" in said, flipped


# A full disk


def train(
    rank: int, folder: str, topology: Topology, values: dict[str, Any], limit: int | None = None
) -> str:
    """train.py; what it raises. Nothing saved may grow beyond `limit` bytes on the last rank."""
    config = from_dict(
        {
            **BASE,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": f"{folder}/tokenizer.json",
            "data_path": f"{folder}/data",
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "make_vocab_size_divisible_by": 8,
            "save": f"{folder}/run",
            "load": values.get("save", f"{folder}/run"),
            "checkpoint_factor": 2,
            "zero_optimization": {"stage": 1},  # with files of its own
            "log_dir": f"{folder}/logs",
            **values,
        },
        world_size=topology.world_size,
    )
    groups = initialize(topology, "gloo", torch.device("cpu"))
    save = loop.save

    def save_limited(*arguments: Any) -> None:
        with small_files(limit if rank == topology.world_size - 1 else None):
            save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_limited)
        try:
            main(config, groups)
        except CheckpointError as error:
            return str(error)
    return ""


class Trainer:
    """Calls train.py in `folder`, which has data for it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder, self.run = world, folder, folder / "run"
        small_tokenizer.write(folder)
        write_dataset(folder / "data", [40] * 30, modulo=280)

    def __call__(self, topology: Topology, limit: int | None = None, **values: Any) -> list[str]:
        """What each rank raises, "" for nothing."""
        n = topology.world_size
        return self.world.run(n, train, str(self.folder), topology, values, limit)

    def first(self, topology: Topology) -> Path:
        """A run that has ended after its first checkpoint, of step 2; its folder."""
        assert set(self(topology, exit_interval=2)) == {""}
        return self.run / "global_step2"


@pytest.fixture
def trainer(world: World, tmp_path: Path) -> Trainer:
    return Trainer(world, tmp_path)


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(dp=2)], ids=str)
def test_a_full_disk_leaves_the_last_checkpoint_and_frees_its_space(
    trainer: Trainer, topology: Topology
) -> None:
    trainer.first(topology)
    files = [path.stat().st_size for path in trainer.run.rglob("*") if path.is_file()]
    disk = trainer.folder / "disk"
    with small_disk(disk, int(1.7 * sum(files))) as is_small:
        run = disk / "run"
        shutil.copytree(trainer.run, run)
        free = shutil.disk_usage(disk).free
        said = trainer(topology, None if is_small else max(files) - 1, save=str(run))
        assert said[0] == said[1]
        reason = "No space left on device" if is_small else "File too large"
        assert f"iteration 4 could not be written to {run}: {reason} (on rank " in said[0]
        assert said[0].endswith(f"untouched; the newest is {run}/global_step2.")
        assert {path.name for path in run.iterdir()} == {"global_step2", "latest", ".lock"}
        if is_small:
            assert shutil.disk_usage(disk).free == free
        assert verify(run / "global_step2") == []
    assert trainer(topology) == ["", ""]  # with room again, the run goes on


def test_one_rank_that_cannot_write_is_enough(trainer: Trainer) -> None:
    """And the others are not left waiting, although DeepSpeed's own save waits for all."""
    topology = Topology(tp=2)
    layers = max(path.stat().st_size for path in trainer.first(topology).glob("layer_*"))
    for limit in (1000, layers + 1000):  # at the first layer's file, and at the optimizer's
        said = trainer(topology, limit)
        assert said[0] == said[1]
        assert "iteration 4 could not be written" in said[0]
        assert "File too large (on rank 1)" in said[0]
        left = {path.name for path in trainer.run.iterdir()}
        assert left == {"global_step2", "latest", ".lock"}


# Files that would run code


class Hostile:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def forge(folder: Path) -> None:
    """Make the manifest true of the files as they are now, as whoever plants one would."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    files = {name: digest(folder / name) for name in manifest.files}
    Manifest(
        folder,
        manifest.iteration,
        manifest.grid,
        manifest.padded_vocab_size,
        manifest.architecture,
        files,
    ).write()


def in_layer_file(folder: Path, hostile: Hostile) -> None:
    torch.save({"x": hostile}, layer_file(folder, 3, 0))
    forge(folder)


def in_old_layer_file(folder: Path, hostile: Hostile) -> None:
    path = layer_file(folder, 3, 0)
    torch.save({"x": hostile}, path, _use_new_zipfile_serialization=False)
    forge(folder)


def in_model_file(folder: Path, hostile: Hostile) -> None:
    """The weights of pipe_parallel_size 0, all in one file."""
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"module": {"sequential.0.x": hostile}}, model_file(folder, 0))


def in_torch_file(folder: Path, hostile: Hostile) -> None:
    """Of a transformers folder."""
    shutil.rmtree(folder)
    folder.mkdir()
    values = {
        "model_type": "gpt_neox",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "rotary_pct": BASE["rotary_pct"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    torch.save({"gpt_neox.embed_in.weight": hostile}, folder / "pytorch_model.bin")


def in_manifest(folder: Path, hostile: Hostile) -> None:
    torch.save(hostile, folder / MANIFEST)


def in_latest(folder: Path, hostile: Hostile) -> None:
    torch.save(hostile, folder.parent / "latest", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (in_layer_file, r"layer_03-model_00-model_states.pt was refused: .* could run code"),
        (in_old_layer_file, r"layer_03-model_00-model_states.pt was refused: .* could run code"),
        (in_model_file, r"mp_rank_00_model_states.pt was refused: .* could run code"),
        (in_torch_file, r"pytorch_model.bin was refused: .* could run code"),
        (in_manifest, r"manifest.json is damaged"),
        (in_latest, r"`latest` names .*, which is not in"),
    ],
)
def test_no_file_of_a_checkpoint_runs_code(
    directory: Path, tmp_path: Path, plant: Callable[[Path, Hostile], None], said: str
) -> None:
    folder = directory / "global_step4"
    plant(folder, Hostile(tmp_path / "ran"))
    source = folder if plant is in_torch_file else directory
    with pytest.raises(CheckpointError, match=said):
        generate(source)
    with pytest.raises(CheckpointError, match=said):
        find_start(config_of(load=str(source), finetune=True), SINGLE)
        Checkpoint.open(source).padded_vocab_size  # noqa: B018  # the optimizer comes later
        generate(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim"])
def test_no_file_of_a_run_runs_code(trainer: Trainer, tmp_path: Path, kind: str) -> None:
    path = trainer.first(Topology()) / f"{kind}_states.pt"
    torch.save({"optimizer_state_dict": Hostile(tmp_path / "ran")}, path)
    assert f"{path} is damaged" in trainer(Topology())[0]
    forge(path.parent)
    said = trainer(Topology())[0]
    assert f"{path} was refused" in said and "could run code" in said
    assert not (tmp_path / "ran").exists()


def test_no_array_file_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=np.array([Hostile(tmp_path / "ran")], dtype=object))
    with pytest.raises(DataError, match=r"tokens\.npz is not an \.npz file of plain arrays"):
        read_tokens(path)
    torch.save(Hostile(tmp_path / "ran"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"tokens\.npz is not an \.npz file of plain arrays"):
        read_tokens(path)
    assert not (tmp_path / "ran").exists()


def test_no_tag_of_a_configuration_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text(f"num_layers: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match=r"a\.yml:1.*tag"):
        load_config([path], world_size=1)
    assert not (tmp_path / "ran").exists()
