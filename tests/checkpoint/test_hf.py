"""Transformers folders load at any grid; damage to them is named, and no pickle runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.config import from_dict
from neox.errors import CheckpointError, NeoXError
from neox.inference.generate import continuation
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.checkpoint.hf_folders import (
    CLOSE,
    INDEX,
    ROWS,
    THEIRS,
    TOKENS,
    drop_tensor,
    edit_config,
    make,
    replace_tensor,
    their_logits,
)
from tests.world import World

GRIDS = [Topology(tp=2), Topology(pp=2, tp=2), Topology(tp=4)]


def our_logits(rank: int, folder: str, topology: Topology) -> Tensor | None:
    grid = {"model_parallel_size": topology.tp, "pipe_parallel_size": topology.pp}
    config = from_dict(
        {"load": folder, "precision": "fp32", **grid}, world_size=topology.world_size
    )
    groups = ProcessGroups.single()
    if topology.world_size > 1:
        groups = initialize(topology, "gloo", torch.device("cpu"))
    return load_model(config, groups)(TOKENS)


def load_here(folder: Path) -> Tensor:
    logits = our_logits(0, str(folder), Topology())
    assert logits is not None
    return logits


def to_bin(folder: Path, parts: int = 1, **more: Tensor) -> None:
    """Change model.safetensors to pytorch_model.bin, as releases of before 2023 have it."""
    tensors = {**load_file(folder / "model.safetensors"), **more}
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        mine = names[part::parts]
        torch.save({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_loads_with_nothing_but_its_name(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, **THEIRS[name])
    assert_close(load_here(folder), their_logits(folder, TOKENS), **CLOSE)


@pytest.mark.parametrize(
    "topology", [Topology(tp=2), Topology(pp=2), Topology(pp=2, tp=2), Topology(tp=4)], ids=str
)
@pytest.mark.parametrize("name", ["parallel", "sequential", "tied", "gpt_j"])
def test_a_folder_loads_at_any_grid(
    world: World, name: str, topology: Topology, tmp_path: Path
) -> None:
    folder = make(tmp_path, max_shard_size="40KB", **THEIRS[name])
    assert len(list(folder.glob("*.safetensors"))) > 2
    *_, last = world.run(topology.world_size, our_logits, str(folder), topology)
    assert_close(last, their_logits(folder, TOKENS), **CLOSE)


@pytest.mark.parametrize("parts", [1, 3])
def test_gpt_j_as_its_hub_has_it(parts: int, tmp_path: Path) -> None:
    """Pickled, with causal masks, and keys in config.json that no version reads any more."""
    folder = make(tmp_path, **THEIRS["gpt_j"])
    expected = their_logits(folder, TOKENS)
    layer = "transformer.h.1.attn"
    buffers = {
        f"{layer}.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8),
        f"{layer}.masked_bias": torch.tensor(-1e9),
    }
    to_bin(folder, parts, **buffers)
    edit_config(folder, rotary=True, gradient_checkpointing=False, scale_attn_weights=True)
    assert_close(load_here(folder), expected, **CLOSE)
    (shard,) = Checkpoint.open(folder).shards(3)
    assert shard.buffers.keys() == {"attn.bias", "attn.masked_bias"}
    name = f"{layer}.{{q,k,v}}_proj.weight"
    assert shard.names["attention.query_key_value.weight"] == name


@pytest.mark.parametrize("parts", [1, 3])
def test_pickled_weights_with_the_buffers_of_their_time(parts: int, tmp_path: Path) -> None:
    folder = make(tmp_path)
    expected = their_logits(folder, TOKENS)
    layer = "gpt_neox.layers.1.attention"
    buffers = {
        f"{layer}.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(1),
    }
    to_bin(folder, parts, **buffers)
    assert_close(load_here(folder), expected, **CLOSE)
    (shard,) = Checkpoint.open(folder).shards(3)
    assert shard.buffers.keys() == {name.removeprefix("gpt_neox.layers.1.") for name in buffers}
    assert shard.names["mlp.linear1.bias"] == "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"


@pytest.mark.parametrize("tied", [False, True])
def test_the_names_that_transformers_5_has_in_memory(tied: bool, tmp_path: Path) -> None:
    from transformers import GPTNeoXForCausalLM

    folder = make(tmp_path, tie_word_embeddings=tied)
    expected = their_logits(folder, TOKENS)
    tensors = GPTNeoXForCausalLM.from_pretrained(folder).state_dict()
    assert "lm_head.weight" in tensors
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_close(load_here(folder), expected, **CLOSE)


class Endless:
    """A tokenizer of the model's whole vocabulary, without text and without an end."""

    vocab_size = ROWS
    eod = -1

    def detokenize(self, ids: Sequence[int]) -> str:
        return ""


def continued(rank: int, folder: str, topology: Topology) -> tuple[list[int], list[Tensor]]:
    """64 greedy tokens after one, and the logits of each one, on the rank that chose it."""
    grid = {"model_parallel_size": topology.tp, "pipe_parallel_size": topology.pp}
    asked = {"maximum_tokens": 64, "return_logits": True}
    config = from_dict({"load": folder, **asked, **grid}, world_size=topology.world_size)
    groups = ProcessGroups.single()
    if topology.world_size > 1:
        groups = initialize(topology, "gloo", torch.device("cpu"))
    steps = list(continuation(load_model(config, groups), Endless(), config, [7], 0))
    logits = [step.logits_V for step in steps if step.logits_V is not None]
    return [step.token for step in steps], logits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], Tensor]:
    """A folder of GPT-J, what transformers writes by it after token 7, and the logits of that."""
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path_factory.mktemp("gpt_j"), **THEIRS["gpt_j"] | {"n_positions": 80})
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(
        torch.tensor([[7]]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.inference_mode():
        return folder, ids[0, 1:].tolist(), model(ids[:, :-1]).logits[0]


@pytest.mark.parametrize(
    "topology", [Topology(), Topology(tp=2), Topology(pp=2), Topology(pp=2, tp=2)], ids=str
)
def test_gpt_j_writes_what_transformers_does(
    world: World, topology: Topology, written: tuple[Path, list[int], Tensor]
) -> None:
    folder, ids, logits = written
    assert len(ids) == 64 and len(set(ids)) > 5
    results = world.run(topology.world_size, continued, str(folder), topology)
    assert [tokens for tokens, _ in results] == [ids] * topology.world_size
    chose = topology.rank(topology.pp - 1, dp=0, tp=0)
    assert_close(torch.stack(results[chose][1]), logits, **CLOSE)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # a mode would not keep root out
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        load_here(folder)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path))
    (shard,) = checkpoint.shards(2)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "model.safetensors") in maps
    del shard
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()


def test_a_tied_projection_that_was_stored_all_the_same(tmp_path: Path) -> None:
    folder = make(tmp_path, tie_word_embeddings=True)
    expected = their_logits(folder, TOKENS)
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_close(load_here(folder), expected, **CLOSE)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size if size > 0 else 0)


WHOLE = {
    "truncated": (lambda f: truncate(f / "model.safetensors", 1), "model.safetensors is damaged"),
    "cut in the header": (
        lambda f: os.truncate(f / "model.safetensors", 100),
        "model.safetensors is damaged",
    ),
    "empty": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is damaged"),
    "no tensor": (
        lambda f: drop_tensor(f, "gpt_neox.layers.0.attention.dense.bias"),
        "it lacks attention.dense.bias",
    ),
    "no norm": (
        lambda f: [drop_tensor(f, f"gpt_neox.final_layer_norm.{n}") for n in ("weight", "bias")],
        "it holds no gpt_neox.final_layer_norm.*",
    ),
    "no projection": (lambda f: drop_tensor(f, "embed_out.weight"), "it holds no embed_out.*"),
    "another depth": (
        lambda f: edit_config(f, num_hidden_layers=1),
        "gpt_neox.layers.1.attention.dense.bias",
    ),
    "another width": (lambda f: edit_config(f, intermediate_size=64), "mlp.linear1.weight"),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=100), "vocab_size in"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
}


@pytest.mark.parametrize("damage", WHOLE)
def test_damage_to_a_whole_file_is_named(damage: str, tmp_path: Path) -> None:
    spoil, said = WHOLE[damage]
    folder = make(tmp_path)
    spoil(folder)
    with pytest.raises(NeoXError) as error:
        load_here(folder)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


Q_PROJ = "transformer.h.1.attn.q_proj.weight"
OF_GPT_J = {
    "no keys": (
        lambda f: drop_tensor(f, "transformer.h.1.attn.k_proj.weight"),
        "is incomplete: it holds no transformer.h.1.attn.k_proj.weight",
    ),
    "no queries, keys and values": (
        lambda f: [drop_tensor(f, Q_PROJ.replace("q_", f"{letter}_")) for letter in "qkv"],
        "it lacks attention.query_key_value.weight",
    ),
    "no bias": (lambda f: drop_tensor(f, "lm_head.bias"), "it lacks final_linear.bias"),
    "no projection": (
        lambda f: [drop_tensor(f, f"lm_head.{n}") for n in ("weight", "bias")],
        "it holds no lm_head.*",
    ),
    "short queries": (
        lambda f: replace_tensor(f, Q_PROJ, torch.ones(28, 32)),
        "{q,k,v}_proj.weight are [28, 32], [32, 32] and [32, 32], which are not the same rows of 4",
    ),
    "a number for queries": (
        lambda f: [replace_tensor(f, Q_PROJ.replace("q_", f"{c}_"), torch.ones(())) for c in "qkv"],
        "are [], [] and [], which are not the same rows of 4 heads",
    ),
    "wide queries": (
        lambda f: [
            replace_tensor(f, Q_PROJ.replace("q_", f"{c}_"), torch.ones(32, 36)) for c in "qkv"
        ],
        "attention.query_key_value.weight of layer 03 is [96, 36]",
    ),
    "another depth": (
        lambda f: edit_config(f, n_layer=1),
        "which has no place in a GPTJForCausalLM of n_layer 1",
    ),
    "biases it has not": (
        lambda f: replace_tensor(f, Q_PROJ.replace("weight", "bias"), torch.ones(32)),
        "is incomplete: it holds no transformer.h.1.attn.k_proj.bias",
    ),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=100), "vocab_size in"),
}


@pytest.mark.parametrize("damage", OF_GPT_J)
def test_damage_to_a_gpt_j_is_named(damage: str, tmp_path: Path) -> None:
    spoil, said = OF_GPT_J[damage]
    folder = make(tmp_path, **THEIRS["gpt_j"])
    spoil(folder)
    with pytest.raises(NeoXError) as error:
        load_here(folder)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


PART = "model-00002-of-00003.safetensors"
IN_PARTS = {
    "missing part": (lambda f: (f / PART).unlink(), PART),
    "truncated part": (lambda f: truncate(f / PART, 3), f"{PART} is damaged"),
    "exchanged parts": (
        lambda f: (f / PART).write_bytes((f / "model-00001-of-00003.safetensors").read_bytes()),
        f"{PART} is damaged",
    ),
    "missing index": (lambda f: (f / INDEX).unlink(), INDEX),
    "index not JSON": (lambda f: truncate(f / INDEX, 9), f"{INDEX} is not JSON"),
    "index without names": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} is damaged"),
    "index leads elsewhere": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../../a.bin"}}'),
        f"{INDEX} is damaged",
    ),
}


@pytest.mark.parametrize("damage", IN_PARTS)
def test_damage_to_parts_is_named(damage: str, tmp_path: Path) -> None:
    spoil, said = IN_PARTS[damage]
    folder = make(tmp_path, max_shard_size="70KB")
    assert (folder / PART).is_file()
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        load_here(folder)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


class Hostile:
    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.victim),)


def test_a_pickle_that_runs_code_does_not(tmp_path: Path) -> None:
    folder, victim = make(tmp_path / "model"), tmp_path / "victim"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"evil": Hostile(str(victim))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin was refused"):
        load_here(folder)
    assert not victim.exists()
