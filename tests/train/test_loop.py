"""train.py from its configuration to its files: saving, resuming, fine-tuning, refusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.config import from_dict
from neox.entrypoints.train import main
from neox.errors import CheckpointError, ConfigError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.train.start import find_start
from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.engine.test_grids import OPTIMIZER
from tests.models import BASE, config_of
from tests.world import World

TOPOLOGY = Topology(pp=2, tp=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer.write(tmp_path)
    write_dataset(tmp_path / "data", [40] * 30, modulo=280)
    return tmp_path


def run_training(
    rank: int, folder: str, name: str, topology: Topology, values: dict[str, Any]
) -> None:
    config = from_dict(
        {
            **BASE,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": f"{folder}/tokenizer.json",
            "data_path": f"{folder}/data",
            "split": "8,1,1",
            "model_parallel_size": topology.tp,
            "pipe_parallel_size": topology.pp,
            "make_vocab_size_divisible_by": 8,
            "eval_interval": 3,
            "eval_iters": 1,
            "log_interval": 1,
            "hidden_dropout": 0.1,
            "train_iters": 6,
            "lr_decay_iters": 6,
            "save": f"{folder}/{name}",
            "load": f"{folder}/{name}",
            "checkpoint_factor": 2,
            "log_dir": f"{folder}/{name}-logs",
            **values,
        },
        world_size=topology.world_size,
    )
    main(config, initialize(topology, "gloo", torch.device("cpu")))


def train(world: World, folder: Path, name: str, topology: Topology = TOPOLOGY, **values: Any):
    world.run(topology.world_size, run_training, str(folder), name, topology, values)
    lines = (folder / f"{name}-logs/metrics.jsonl").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def steps(folder: Path, name: str) -> list[int]:
    return sorted(int(p.name[11:]) for p in (folder / name).glob("global_step*"))


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(world: World, folder: Path) -> None:
    whole = train(world, folder, "whole")
    assert steps(folder, "whole") == [2, 4, 6]
    assert list(whole) == [1, 2, 3, 4, 5, 6]

    train(world, folder, "parts", exit_interval=4)
    assert steps(folder, "parts") == [2, 4]
    parts = train(world, folder, "parts")
    assert list(parts) == [1, 2, 3, 4, 5, 6]
    for iteration, row in whole.items():
        for key in ("train/lm_loss", "train/learning_rate", "train/grad_norm"):
            assert parts[iteration][key] == row[key], (iteration, key)
    assert parts[6]["validation/lm_loss"] == whole[6]["validation/lm_loss"]

    ours = Checkpoint.open(folder / "parts")
    whole = Checkpoint.open(folder / "whole").source
    for index in whole.indices:
        for path, other in zip(whole.files(index), ours.source.files(index), strict=True):
            expected, got = (torch.load(p, weights_only=True) for p in (path, other))
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_finetuning_starts_over_from_the_weights(world: World, folder: Path) -> None:
    train(world, folder, "base", train_iters=4, lr_decay_iters=4)
    one = Topology()
    tuned = train(
        world, folder, "tuned", one, load=f"{folder}/base", finetune=True, train_iters=2,
        checkpoint_factor=5,
    )  # fmt: skip
    assert list(tuned) == [1, 2]
    assert steps(folder, "tuned") == [2]
    scratch = train(world, folder, "scratch", one, train_iters=2, checkpoint_factor=5)
    assert tuned[1]["train/lm_loss"] < scratch[1]["train/lm_loss"]


def test_weights_alone_resume_with_a_fresh_optimizer(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(world, folder, "run", exit_interval=2)
    for path in (folder / "run/global_step2").glob("*.*"):
        if not path.name.startswith("layer_"):
            path.unlink()
    rows = train(world, folder, "run", train_iters=3, lr_decay_iters=3)
    assert list(rows) == [1, 2, 3]
    find_start(config_of(load=f"{folder}/run", iteration=2), ProcessGroups.single())
    assert "no optimizer state: starting a fresh optimizer" in capsys.readouterr().out


def test_another_grid_or_precision_takes_the_optimizer_state_or_leaves_it(
    world: World, folder: Path
) -> None:
    values: dict[str, Any] = {"optimizer": OPTIMIZER, "hidden_dropout": 0.0}
    whole = train(world, folder, "whole", **values)
    train(world, folder, "run", exit_interval=4, **values)
    rows = train(world, folder, "run", Topology(pp=2), **values)
    losses = [rows[iteration]["train/lm_loss"] for iteration in (5, 6)]
    assert losses == pytest.approx([whole[i]["train/lm_loss"] for i in (5, 6)], abs=1e-5)

    values |= {"iteration": 4, "save": f"{folder}/other"}
    half = train(world, folder, "run", Topology(), precision="bfloat16", **values)
    assert half[6]["train/lm_loss"] == pytest.approx(losses[1], abs=0.05)
    fresh = train(world, folder, "run", Topology(), no_load_optim=True, **values)
    assert abs(fresh[6]["train/lm_loss"] - losses[1]) > 1e-3
    assert not list(folder.glob("*/.unfinished"))


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim", "mp_rank_01_model"])
def test_optimizer_files_that_are_missing_or_damaged_are_named(
    world: World, folder: Path, name: str
) -> None:
    grid, values = Topology(pp=2), {"zero_optimization": {"stage": 1}}
    train(world, folder, "run", grid, **values, exit_interval=2)
    path = folder / f"run/global_step2/{name}_states.pt"
    contents = path.read_bytes()
    for damaged in (contents[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name}.*is damaged.*no_load_optim: true"):
            train(world, folder, "run", grid, **values)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}_states\.pt is missing.*no_load_optim"):
        train(world, folder, "run", grid, **values)
    rows = train(world, folder, "run", grid, **values, no_load_optim=True, exit_interval=3)
    assert list(rows) == [1, 2, 3]


def test_a_tokenizer_larger_than_the_checkpoints_vocabulary_is_refused(
    world: World, folder: Path
) -> None:
    train(world, folder, "run", Topology(), exit_interval=2)
    tokenizer = small_tokenizer.train()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save(f"{folder}/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer has 300 tokens, .* vocabulary has 280"):
        train(world, folder, "run", Topology())


@pytest.mark.parametrize(("saved", "wanted"), [("adam", "sgd"), ("sgd", "adam")])
def test_another_optimizer_cannot_take_the_state(
    world: World, folder: Path, saved: str, wanted: str
) -> None:
    def optimizer(kind: str) -> dict[str, Any]:
        return {"type": kind, "params": {"lr": 0.01}}

    train(world, folder, "run", Topology(), optimizer=optimizer(saved), exit_interval=2)
    with pytest.raises(CheckpointError, match=f"is that of {saved}, .* optimizer is {wanted}"):
        train(world, folder, "run", Topology(), optimizer=optimizer(wanted))
    values = {"optimizer": optimizer(wanted), "no_load_optim": True, "exit_interval": 3}
    assert list(train(world, folder, "run", Topology(), **values)) == [1, 2, 3]


def test_a_run_goes_on_without_latest(world: World, folder: Path) -> None:
    train(world, folder, "run", Topology(), exit_interval=4)
    (folder / "run/latest").unlink()
    assert list(train(world, folder, "run", Topology(), train_iters=5)) == [1, 2, 3, 4, 5]
    assert (folder / "run/latest").read_text() == "global_step5"


def test_a_save_folder_that_cannot_be_written_ends_the_run_before_it_starts(
    world: World, folder: Path
) -> None:
    (folder / "run").touch()
    with pytest.raises(CheckpointError, match="save: checkpoints cannot be written"):
        train(world, folder, "run", Topology())


def test_a_load_folder_that_is_not_this_runs_own_must_hold_a_checkpoint(
    world: World, folder: Path
) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        train(world, folder, "run", Topology(), load=f"{folder}/elsewhere")


def test_fp16_is_refused_on_a_cpu(world: World, folder: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 training needs a GPU"):
        train(world, folder, "run", Topology(), precision="fp16")
