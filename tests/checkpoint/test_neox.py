"""Layer files: what is found, what is refused, and how it is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.neox import Checkpoint, layer_file
from neox.errors import CheckpointError
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from tests.models import config_of, model_layers, random_weights, write_model

SINGLE = ProcessGroups.single()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As upstream writes it: without a manifest."""
    (write_model(tmp_path, 7, seed=7) / MANIFEST).unlink()
    return tmp_path


def read_all(checkpoint: Checkpoint, **values: object) -> None:
    for layer in model_layers(config_of(**values), SINGLE):
        if layer.has_parameters:
            checkpoint.read(layer, SINGLE)


def test_what_was_written_is_read(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    assert (checkpoint.iteration, checkpoint.tp, checkpoint.padded_vocab_size) == (7, 1, 64)
    weights = random_weights(config_of(), 7)
    for layer in model_layers(config_of(), SINGLE):
        for name, tensor in checkpoint.read(layer, SINGLE).items() if layer.layout else ():
            assert torch.equal(tensor, weights[f"{layer.index}.{name}"])
    assert (directory / "global_step7/configs/small.yml").read_text() == "{}"
    assert (directory / "latest").read_text() == "global_step7"
    assert not (directory / ".unfinished").exists()


def test_names_and_buffers_of_the_20B_era_are_read(directory: Path) -> None:
    path = layer_file(directory / "global_step7", 2, 0)
    tensors = torch.load(path, weights_only=True)
    old = {
        name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): tensor
        for name, tensor in tensors.items()
    }
    torch.save({**old, "attention.rotary_emb.inv_freq": torch.ones(2)}, path)
    read = Checkpoint.open(directory).read(model_layers(config_of(), SINGLE)[2], SINGLE)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_files_of_before_torch_1_6_are_read(directory: Path) -> None:
    for path in (directory / "global_step7").glob("layer_*"):
        tensors = torch.load(path, weights_only=True)
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    read = Checkpoint.open(directory).read(model_layers(config_of(), SINGLE)[0], SINGLE)
    weights = random_weights(config_of(), 7)
    assert torch.equal(read["word_embeddings.weight"], weights["0.word_embeddings.weight"])


def test_a_step_folder_may_be_given_itself(directory: Path) -> None:
    assert Checkpoint.open(directory / "global_step7").iteration == 7


def test_a_step_is_known_by_its_link_its_manifest_and_from_within(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = directory / "global_step7"
    (directory / "best").symlink_to(folder)
    assert Checkpoint.open(directory / "best").iteration == 7
    monkeypatch.chdir(folder)
    assert Checkpoint.open(Path(".")).iteration == 7
    write_model(directory, 9).rename(directory / "renamed")
    assert Checkpoint.open(directory / "renamed").iteration == 9  # its manifest tells


def test_a_folder_with_weights_that_a_run_saved_into_is_that_run_s(directory: Path) -> None:
    for path in (directory / "global_step7").glob("layer_*"):
        shutil.copy(path, directory)
    assert Checkpoint.open(directory).folder == directory / "global_step7"
    (directory / "latest").unlink()
    assert Checkpoint.open(directory).folder == directory


def test_an_iteration_may_be_chosen(directory: Path) -> None:
    write_model(directory, 9)
    assert Checkpoint.open(directory).iteration == 9
    assert Checkpoint.open(directory, 7).iteration == 7


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "latest").unlink(), "no `latest` file"),
        (lambda d: (d / "latest").write_text("global_step8"), "names global_step8, which is not"),
        (lambda d: (d / "latest").write_text("\n"), "names nothing, .* it holds global_step7"),
        (lambda d: (d / "latest").write_bytes(b"\xff\x00"), "it holds global_step7"),
        (lambda d: layer_file(d / "global_step7", 6, 0).unlink(), "holds no layer_06"),
        (lambda d: layer_file(d / "global_step7", 3, 0).write_bytes(b""), "layer_03"),
        (lambda d: layer_file(d / "global_step7", 3, 0).write_bytes(b"\x80garbage"), "layer_03"),
        (lambda d: truncate(layer_file(d / "global_step7", 3, 0)), "layer_03"),
        (lambda d: torch.save([1], layer_file(d / "global_step7", 3, 0)), "not a layer file"),
        (
            lambda d: two_shards(d, lambda tensors: tensors.pop("mlp.linear1.bias")),
            "layer_03-model_01.*it lacks mlp.linear1.bias",
        ),
        (
            lambda d: two_shards(d, shorten),
            r"mlp.linear1.bias of layer 03 have different shapes, \[\[64\], \[63\]\]",
        ),
        (
            lambda d: torch.save({}, layer_file(d / "global_step7", 3, 1)),
            "layer_00-model_01-model_states.pt, layer_02-model_01-model_states.pt",
        ),
    ],
    ids=[
        "latest",
        "dangling",
        "blank",
        "binary",
        "missing",
        "empty",
        "garbage",
        "short",
        "list",
        "shard_lacks",
        "shard_short",
        "odd_shard",
    ],
)
def test_damage_is_named(directory: Path, spoil, said: str) -> None:
    spoil(directory)
    with pytest.raises(CheckpointError, match=said):
        read_all(Checkpoint.open(directory))


def two_shards(directory: Path, spoil: Callable[[dict[str, Tensor]], object]) -> None:
    """Cut every layer into two shards, and spoil the second one of layer 3."""
    folder = directory / "global_step7"
    for layer in model_layers(config_of(), SINGLE):
        if layer.layout is None:
            continue
        whole = torch.load(layer_file(folder, layer.index, 0), weights_only=True)
        for rank in range(2):
            tensors = {
                name: file_shard(shard(whole[name], layout, rank, 2), layout, rank, 2)
                for name, layout in layer.layout.items()
            }
            if (layer.index, rank) == (3, 1):
                spoil(tensors)
            torch.save(tensors, layer_file(folder, layer.index, rank))


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors["mlp.linear1.bias"] = tensors["mlp.linear1.bias"][:-1].clone()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_missing_iteration_is_answered_with_what_there_is(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iteration 5 asks for .* it holds global_step7"):
        Checkpoint.open(directory, 5)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_wrong_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": 64}, r"word_embeddings.weight of layer 00 is \[64, 32\]"),
        ({"num_layers": 1}, "holds no layer_04"),
        ({"num_layers": 3}, "holds no layer_04"),
        ({"norm": "rmsnorm"}, "layer_02.* it lacks input_layernorm.scale"),
        ({"use_bias_in_mlp": False}, "layer_02.* it also has mlp.linear1.bias"),
        ({"pos_emb": "learned"}, "layer_00.* it lacks position_embeddings.weight"),
        ({"no_weight_tying": False}, "layer_06.* output projection .*no_weight_tying"),
        ({"intermediate_size": 64}, r"is \[128, 32\] .* makes it \[64, 32\]"),
    ],
)
def test_tensors_of_another_model_are_refused_whatever_was_checked_before(
    directory: Path, values: dict[str, object], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_all(Checkpoint.open(directory), **values)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_does_not_run(directory: Path, tmp_path: Path, zipped: bool) -> None:
    path = layer_file(directory / "global_step7", 2, 0)
    ran = tmp_path / "ran"
    torch.save({"x": _Hostile(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="layer_02"):
        read_all(Checkpoint.open(directory))
    assert not ran.exists()


def test_a_layer_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, 1, num_layers=4)
    with pytest.raises(CheckpointError, match=r"layer_05.* lacks norm\.bias, .* of another model"):
        read_all(Checkpoint.open(tmp_path), num_layers=2)
