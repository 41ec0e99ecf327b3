"""Folders of mesh-transformer-jax load at any grid; damage to them is named."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.architecture import describe
from neox.checkpoint.mesh import MeshFiles
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig, from_dict
from neox.config.npz import Array
from neox.errors import CheckpointError, ConfigError
from neox.inference.load import load_model
from neox.model.gpt import layers
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.train.start import find_start
from tests.checkpoint.hf_folders import CLOSE, TOKENS
from tests.checkpoint.mesh_folders import HEADS, KEYS, ROWS, gpt_j, write
from tests.world import World

SINGLE = ProcessGroups.single()
WAYS: dict[str, dict[str, Any]] = {
    "slim": {},
    "full": {"slim": False},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32, "shards": 2, "pieces": 3},
    "one shard": {"shards": 1},
    "more pieces than arrays": {"pieces": 40},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt_j()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return write(tmp_path / "step_7", model.state_dict())


def config_for(folder: Path | str, tp: int = 1, pp: int = 1, **values: Any) -> NeoXConfig:
    grid = {"model_parallel_size": tp, "pipe_parallel_size": pp}
    given = {"load": str(folder), "precision": "fp32", **KEYS, **grid, **values}
    return from_dict(given, world_size=tp * pp)


def read_all(rank: int, folder: str, tp: int) -> list[dict[str, Tensor]]:
    """Every layer's tensors of one rank."""
    config = config_for(folder, tp)
    groups = SINGLE if tp == 1 else initialize(Topology(tp=tp), "gloo", torch.device("cpu"))
    checkpoint = Checkpoint.open(Path(folder), config=config)
    model = layers(config, ROWS, torch.float32, groups)
    return [checkpoint.read(layer, groups) for layer in model if layer.has_file]


def logits(rank: int, folder: str, tp: int, pp: int) -> Tensor | None:
    groups = SINGLE
    if tp * pp > 1:
        groups = initialize(Topology(tp=tp, pp=pp), "gloo", torch.device("cpu"))
    return load_model(config_for(folder, tp, pp), groups)(TOKENS)


def expected(weights: dict[str, Tensor], depth: int) -> list[dict[str, Tensor]]:
    """The layers that GPTJForCausalLM's tensors are, as one shard."""
    found = [{"word_embeddings.weight": weights["transformer.wte.weight"]}]
    for index in range(depth):
        block = f"transformer.h.{index}."
        parts = [weights[f"{block}attn.{letter}_proj.weight"] for letter in "qkv"]
        heads = [part.unflatten(0, (HEADS, -1)) for part in parts]
        names = {
            "input_layernorm.weight": "ln_1.weight",
            "input_layernorm.bias": "ln_1.bias",
            "attention.dense.weight": "attn.out_proj.weight",
            "mlp.linear1.weight": "mlp.fc_in.weight",
            "mlp.linear1.bias": "mlp.fc_in.bias",
            "mlp.linear2.weight": "mlp.fc_out.weight",
            "mlp.linear2.bias": "mlp.fc_out.bias",
        }
        found.append(
            {
                "attention.query_key_value.weight": torch.stack(heads, 1).flatten(0, 2),
                **{ours: weights[block + theirs] for ours, theirs in names.items()},
            }
        )
    for ours, theirs in (("norm", "transformer.ln_f"), ("final_linear", "lm_head")):
        found.append({f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")})
    return found


def assert_equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name].float(), theirs[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_holds_the_weights_that_were_written(model: Any, tmp_path: Path, way: str) -> None:
    folder = write(tmp_path / "step_7", model.state_dict(), **WAYS[way])
    assert_equal(read_all(0, str(folder), 1), expected(model.state_dict(), 2))


def test_layers_are_stored_in_the_order_of_their_names(tmp_path: Path) -> None:
    weights = gpt_j(layers=12).state_dict()
    folder = write(tmp_path / "step_7", weights, shards=2)
    assert_equal(read_all(0, str(folder), 1), expected(weights, 12))


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_computes_what_transformers_does(
    model: Any, folder: Path, world: World, tp: int, pp: int
) -> None:
    with torch.inference_mode():
        theirs = model(TOKENS).logits
    ours = [found for found in world.run(tp * pp, logits, str(folder), tp, pp) if found is not None]
    assert ours
    for found in ours:
        assert_close(found, theirs, **CLOSE)


def test_two_ranks_hold_halves_of_what_one_holds(folder: Path, world: World) -> None:
    whole = read_all(0, str(folder), 1)
    model = layers(config_for(folder), ROWS, torch.float32, SINGLE)
    layouts = [layer.layout or {} for layer in model if layer.has_file]
    for rank, held in enumerate(world.run(2, read_all, str(folder), 2)):
        for layout, one, half in zip(layouts, whole, held, strict=True):
            for name, tensor in half.items():
                assert torch.equal(tensor, shard(one[name], layout[name], rank, 2)), name


def test_summed_tensors_are_not_rounded_to_the_files_precision(folder: Path) -> None:
    shards = MeshFiles(folder, config_for(folder)).shards(0)
    assert {shard.described("word_embeddings.weight").dtype for shard in shards} == {torch.float32}
    layer = MeshFiles(folder, config_for(folder)).shards(2)[0]
    assert layer.tensors["mlp.linear2.bias"].dtype == torch.float32
    assert layer.tensors["mlp.linear1.weight"].dtype == torch.bfloat16


def test_only_headers_are_read_to_open_and_to_tell_shapes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(array: Any) -> bytearray:
        assert array.shape == (), f"{array} is read"
        return step(array)

    step = Array.read
    monkeypatch.setattr(Array, "read", refuse)
    checkpoint = Checkpoint.open(folder, config=config_for(folder))
    assert checkpoint.padded_vocab_size == ROWS
    assert describe(checkpoint)["num_layers"] == 2
    with pytest.raises(AssertionError, match="is read"):
        checkpoint.shards(0)[0].tensors["word_embeddings.weight"]


def test_what_no_array_tells_is_asked_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads and rotary_pct"):
        from_dict({"load": str(folder), "precision": "fp32"}, world_size=1)
    with pytest.raises(CheckpointError, match=r"does not tell num_attention_heads and rotary_pct"):
        describe(Checkpoint.open(folder))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        MeshFiles(folder).shards(2)[0].tensors["attention.query_key_value.weight"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_layers": 3}, "num_layers is 3, but num_layers is 2"),
        ({"hidden_size": 64}, "hidden_size is 64, but hidden_size is 32"),
        ({"rotary_interleaved": False}, "rotary_interleaved is false, but"),
        ({"num_attention_heads": 6}, "num_attention_heads is 6, but"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2, but"),  # and 4 shards
    ],
)
def test_contradictions_are_told(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(folder, **values)


def test_a_width_of_4096_is_gpt_j_6b(tmp_path: Path) -> None:
    weights = dict.fromkeys(
        [f"transformer.h.0.attn.{name}_proj.weight" for name in ("q", "k", "v", "out")],
        torch.zeros(4096, 4096),
    )
    weights |= {
        "transformer.h.0.mlp.fc_in.weight": torch.zeros(8, 4096),
        "transformer.h.0.mlp.fc_in.bias": torch.zeros(8),
        "transformer.h.0.mlp.fc_out.weight": torch.zeros(4096, 8),
        "transformer.wte.weight": torch.zeros(8, 4096),
        "lm_head.weight": torch.zeros(8, 4096),
        "lm_head.bias": torch.zeros(8),
    }
    for name in ("ln_f", "h.0.ln_1"):
        weights |= {f"transformer.{name}.{kind}": torch.zeros(4096) for kind in ("weight", "bias")}
    weights["transformer.h.0.mlp.fc_out.bias"] = torch.zeros(4096)
    config = from_dict({"load": str(write(tmp_path / "step_1", weights))}, world_size=1)
    assert (config.num_attention_heads, config.rotary_dim, config.seq_length) == (16, 64, 2048)
    assert (config.intermediate_size, config.precision) == (8, "bfloat16")


def test_training_starts_from_the_weights(folder: Path) -> None:
    schedule = {"train_iters": 4, "lr_decay_iters": 4, "optimizer": {"type": "Adam", "params": {}}}
    config = config_for(folder, **schedule)
    start = find_start(config, SINGLE)
    assert (start.iteration, start.with_optimizer) == (0, False)
    assert start.checkpoint is not None
    assert start.checkpoint.padded_vocab_size == ROWS
    layer = layers(config, ROWS, torch.float32, SINGLE)[2]
    start.checkpoint.read(layer, SINGLE)  # with the configuration's heads
    _flip(folder / "shard_1/3.npz")
    with pytest.raises(CheckpointError, match=r"shard_1/3\.npz is damaged"):
        find_start(config, SINGLE)


def _rewrite(path: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    with np.load(path) as stored:
        arrays = [stored[name] for name in stored.files]
    np.savez(path, *change(arrays))


def _flip(path: Path) -> None:
    """Change a number's bit, past the header of the first array."""
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def _add_pickle(path: Path) -> None:
    np.savez(path, np.array([Bomb()], dtype=object))


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle was run",))


def _rename_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.pkl", pickle.dumps([1]))


def _short_member(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a piece is missing": (lambda f: (f / "shard_1/3.npz").unlink(), r"shard_1/3\.npz is missing"),
    "the last piece": (lambda f: (f / "shard_1/15.npz").unlink(), r"shard_1/15\.npz is missing"),
    "the first piece": (lambda f: (f / "shard_0/0.npz").unlink(), r"shard_0/0\.npz is missing"),
    "a shard in between": (lambda f: shutil.rmtree(f / "shard_2"), r"shard_2 is missing"),
    "the last shard": (lambda f: shutil.rmtree(f / "shard_3"), r"3 shards found"),
    "truncated": (lambda f: _truncate(f / "shard_1/3.npz"), r"shard_1/3\.npz is damaged"),
    "empty": (lambda f: (f / "shard_1/3.npz").write_bytes(b""), r"shard_1/3\.npz is damaged"),
    "no archive": (lambda f: (f / "shard_1/3.npz").write_text("x" * 99), r"3\.npz is damaged"),
    "a flipped bit": (lambda f: _flip(f / "shard_1/3.npz"), r"shard_1/3\.npz is damaged"),
    "a pickle": (lambda f: _add_pickle(f / "shard_1/3.npz"), r"shard_1/3\.npz is damaged"),
    "other members": (lambda f: _rename_member(f / "shard_1/3.npz"), r"3\.npz holds 'weights"),
    "fewer numbers": (lambda f: _short_member(f / "shard_1/3.npz"), r"shard_1/3\.npz is damaged"),
    "an array less": (
        lambda f: _rewrite(f / "shard_1/3.npz", lambda arrays: arrays[:-1]),
        r"shard_1 is not a shard of GPT-J, or is incomplete: its 26 arrays",
    ),
    "another shape": (
        lambda f: _rewrite(f / "shard_1/3.npz", lambda arrays: [each[:-1] for each in arrays]),
        r"arr_0\.npy in .*shard_1/3\.npz is \[31\], but layer_0/linear_4/b has to be \[32\]",
    ),
    "integers": (
        lambda f: _rewrite(f / "shard_1/3.npz", lambda a: [each.view("<i4") for each in a]),
        r"shard_1/3\.npz",
    ),
    "another step": (
        lambda f: _rewrite(f / "shard_1/15.npz", lambda arrays: [np.array(8)]),
        r"shard_1/15\.npz is of step 8, and shard_0 of step 383500",
    ),
    "a name of no number": (
        lambda f: shutil.copy(f / "shard_1/3.npz", f / "shard_1/x.npz"),
        r"shard_1/x\.npz does not belong",
    ),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder: Path, damage: str) -> None:
    config = config_for(folder)
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(config, SINGLE)


def test_column_major_arrays_are_read(folder: Path, model: Any) -> None:
    for path in folder.glob("shard_*/*.npz"):
        _rewrite(path, lambda arrays: [np.asfortranarray(a) if a.ndim else a for a in arrays])
    assert_equal(read_all(0, str(folder), 1), expected(model.state_dict(), 2))
