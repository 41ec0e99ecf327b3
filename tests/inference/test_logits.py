"""Token ids in, logits out: what is read, refused, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox.entrypoints.logits import main
from neox.errors import DataError
from neox.inference.load import load_model
from neox.inference.logits import check_output, read_tokens, write_logits
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import (
    VOCAB,
    built,
    config_of,
    forward,
    random_weights,
    tokens,
    write_model,
)
from tests.world import World

SINGLE = ProcessGroups.single()


def model_of(directory: Path, **values: Any) -> InferenceModel:
    write_model(directory, 5, **values)
    return load_model(config_of(load=str(directory), **values), SINGLE)


@pytest.mark.parametrize("names", [["tokens"], ["input_ids", "mask"], ["x"]])
@pytest.mark.parametrize("dtype", ["int64", "uint16", "int32"])
def test_token_ids_are_found(tmp_path: Path, names: list[str], dtype: str) -> None:
    arrays = {name: np.full((2, 3), number, dtype) for number, name in enumerate(names)}
    np.savez(tmp_path / "ids.npz", **arrays)
    found = read_tokens(tmp_path / "ids.npz")
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros((1, 2), int), "b": np.zeros((1, 2), int)}, "holds a, b: name the one"),
        ({}, "holds no arrays"),
        ({"tokens": np.zeros((2, 3))}, r"tokens is float64 \[2, 3\], but token ids are integers"),
        ({"tokens": np.zeros((2, 3), bool)}, "tokens is bool"),
        ({"tokens": np.zeros(3, int)}, r"tokens is int64 \[3\]"),
        ({"tokens": np.zeros((0, 3), int)}, r"\[0, 3\], .* at least one of each"),
        ({"tokens": np.array([[{}]], object)}, "not an .npz file of plain arrays of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "ids.npz", **arrays)
    with pytest.raises(DataError, match=said):
        read_tokens(tmp_path / "ids.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_tokens(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("1 2 3")
    np.save(tmp_path / "bare.npy", np.zeros((2, 3), int))
    np.savez(tmp_path / "cut.npz", tokens=np.zeros((50, 30), int))
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.npz").touch()
    for name in ("text.npz", "bare.npy", "cut.npz", "empty.npz"):
        with pytest.raises(DataError, match=rf"{name} is not an \.npz file"):
            read_tokens(tmp_path / name)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_logits_are_those_of_the_model(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neox.inference.logits._CHUNK", chunk)
    write_logits(model_of(tmp_path), tokens(3), tmp_path / "logits.npz")
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as found:
        assert found.files == ["logits"]
        logits = found["logits"]
    whole = forward(built(config_of(), random_weights(config_of()), SINGLE), tokens(3))
    assert logits.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(logits), whole, rtol=0, atol=1e-5)


def write_as_ranks(rank: int, directory: str, topology: Topology) -> bool:
    """Each rank into a folder of its own; whether it wrote."""
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(
        world_size=topology.world_size,
        load=directory,
        model_parallel_size=topology.tp,
        pipe_parallel_size=topology.pp,
    )
    path = Path(directory) / str(rank) / "logits.npz"
    write_logits(load_model(config, groups), tokens(3), path)
    return path.exists()


def test_one_rank_writes_what_all_compute(tmp_path: Path, world: World) -> None:
    write_model(tmp_path, 5)
    wrote = world.run(4, write_as_ranks, str(tmp_path), Topology(pp=2, tp=2))
    assert wrote == [False, False, True, False]
    whole = forward(built(config_of(), random_weights(config_of()), SINGLE), tokens(3))
    logits = torch.from_numpy(np.load(tmp_path / "2/logits.npz")["logits"])
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_ids_out_of_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    ids = tokens(3)
    ids[1, 4] = wrong
    with pytest.raises(DataError, match=rf"from .*{wrong}.* ids 0 to 63"):
        write_logits(model_of(tmp_path), ids, tmp_path / "logits.npz")
    assert not (tmp_path / "logits.npz").exists()


def test_rows_longer_than_the_learned_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="17 tokens long, but the model has learned 16 positions"):
        write_logits(model_of(tmp_path, pos_emb="learned"), tokens(1, 17), tmp_path / "logits.npz")
    write_logits(model_of(tmp_path / "rotary"), tokens(1, 17), tmp_path / "logits.npz")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "it is a folder"), (tmp_path / "file/x.npz", "logits cannot")):
        with pytest.raises(DataError, match=said):
            check_output(path)
    check_output(tmp_path / "new/x.npz")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_place_is_looked_at_before_the_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", tokens=tokens(3).numpy())
    config = config_of(
        load=str(tmp_path / "none"),
        sample_input_file=str(tmp_path / "ids.npz"),
        sample_output_file=str(tmp_path),
    )
    with pytest.raises(DataError, match="it is a folder"):
        main(config, SINGLE)
