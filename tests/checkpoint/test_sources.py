"""The single mp_rank file of pipe_parallel_size 0 is read as layer files are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file, model_file
from neox.errors import CheckpointError
from neox.inference.load import load_model
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from tests.models import (
    ARCHITECTURES,
    built,
    config_of,
    forward,
    model_layers,
    random_weights,
    tokens,
)

SINGLE = ProcessGroups.single()


def write(folder: Path, values: dict[str, Any], tp: int = 1, prefix: str = "sequential.") -> None:
    """What upstream writes at pipe_parallel_size 0, its random states included."""
    folder.mkdir(parents=True)
    config = config_of(**values)
    weights = random_weights(config)
    for rank in range(tp):
        module = {}
        for layer in model_layers(config, SINGLE):
            if layer.has_file:
                assert layer.layout is not None
                for name, layout in layer.layout.items():
                    held = shard(weights[f"{layer.index}.{name}"], layout, rank, tp)
                    module[f"{prefix}{layer.index}.{name}"] = file_shard(held, layout, rank, tp)
        state = {
            "module": module,
            "iteration": 20,
            "optimizer": {"state": {0: {"step": 20}}, "param_groups": [{"params": [0]}]},
            "args": {"num_layers": 2},
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.RandomState(1).get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
        torch.save(state, model_file(folder, rank))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_loaded(tmp_path: Path, name: str, tp: int) -> None:
    values = ARCHITECTURES[name]
    write(tmp_path / "global_step20", values, tp)
    (tmp_path / "latest").write_text("global_step20")
    config = config_of(**values, load=str(tmp_path))
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.tp, checkpoint.iteration) == (tp, 20)
    logits = load_model(config, SINGLE)(tokens())
    assert logits is not None
    stage = built(config, random_weights(config), SINGLE)
    for _, module in stage:
        if isinstance(module, nn.Module):
            module.eval()
    with torch.no_grad():  # with gradients, attention sums in another order
        whole = forward(stage, tokens())
    assert torch.equal(logits, whole)


def test_upstreams_wrapper_may_stand_in_front(tmp_path: Path) -> None:
    write(tmp_path / "global_step20", {}, prefix="module.sequential.")
    assert Checkpoint.open(tmp_path / "global_step20").indices == [0, 2, 3, 5, 6]


def test_numpys_random_state_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "x", {})
    state = load_model_file(model_file(tmp_path / "x", 0))
    name, array, position, *_ = state["np_rng_state"]
    assert (name, position, state["iteration"]) == ("MT19937", 624, 20)
    assert not isinstance(array, np.ndarray)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": None}, "mp_rank_00_model_states.pt holds no weights, and there are no layer"),
        ({"module": {"transformer.h.0": torch.ones(1)}}, "holds transformer.h.0, which is not"),
        ({"module": [1]}, "its weights are not a mapping"),
        ({"module": {"sequential.0.word_embeddings.weight": 3}}, "not a mapping of tensors"),
    ],
    ids=["none", "names", "list", "number"],
)
def test_what_is_no_neox_model_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    torch.save(change, model_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path).shards(0)


def test_shards_must_be_of_one_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "a", {}, tp=2)
    torch.save({"module": {"sequential.0.x": torch.ones(1)}}, model_file(tmp_path / "a", 1))
    with pytest.raises(CheckpointError, match="do not hold the same tensors"):
        Checkpoint.open(tmp_path / "a")
    model_file(tmp_path / "a", 0).unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: mp_rank_00_model_states\.pt missing"):
        Checkpoint.open(tmp_path / "a")


def test_a_flipped_byte_is_found_before_it_is_used(tmp_path: Path) -> None:
    write(tmp_path / "x", {})
    path = model_file(tmp_path / "x", 0)
    weight = random_weights(config_of())["2.attention.dense.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is damaged"):
        load_model(config_of(load=str(tmp_path / "x")), SINGLE)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"module": {"sequential.0.x": _Hostile(tmp_path / "ran")}}, model_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match="was refused"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "ran").exists()
