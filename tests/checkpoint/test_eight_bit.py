"""Folders of 8-bit weights, as hivemind's: what is read is what bitsandbytes dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.hf.names import interleave
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.summary import summarize
from neox.config import from_dict
from neox.errors import CheckpointError
from neox.inference.load import load_model
from neox.model.frozen import Frozen
from neox.model.gpt import layers
from neox.model.quantized import EightBit
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.checkpoint.hf_folders import CLOSE, ROWS, TOKENS, make, stored, their_logits
from tests.world import World

SINGLE = ProcessGroups.single()
# Blocks of 4096 elements span rows, end within them, and the last is short; 100 divides nothing.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_j": {"model_type": "gptj"},
    "odd": {"model_type": "gptj", "n_embd": 36, "n_inner": 100, "rotary_dim": 6},
    "wide": {"model_type": "gptj", "n_embd": 24, "n_inner": 4104},
    "neox": {},
}
PATHS = {
    2: ["attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2"],
    0: ["word_embeddings"],
}


def quantize(folder: Path, *, as_bin: bool = True) -> dict[str, Tensor]:
    """Write a folder's matrices in 8 bits; return all weights as bitsandbytes dequantizes them."""
    written: dict[str, Tensor] = {}
    dequantized = {}
    for name, tensor in stored(folder).items():
        if tensor.dim() != 2:
            written[name] = dequantized[name] = tensor
            continue
        codes, state = bnb.quantize_blockwise(tensor, blocksize=4096)
        stem = name.removesuffix(".weight")
        written |= {name: codes, f"{stem}.absmax": state.absmax, f"{stem}.code": state.code}
        dequantized[name] = bnb.dequantize_blockwise(codes, state)
    save_all(folder, written, as_bin=as_bin)
    return dequantized


def save_all(folder: Path, tensors: dict[str, Tensor], *, as_bin: bool = True) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make(tmp_path / "hivemind", model_type="gptj")
    quantize(made)
    return made


def config_for(folder: Path | str, tp: int = 1) -> Any:
    given = {"load": str(folder), "precision": "fp32", "model_parallel_size": tp}
    return from_dict(given, world_size=tp)


def logits(rank: int, folder: str, tp: int) -> Tensor | None:
    groups = SINGLE if tp == 1 else initialize(Topology(tp=tp), "gloo", torch.device("cpu"))
    return load_model(config_for(folder, tp), groups)(TOKENS)


@pytest.mark.parametrize("as_bin", [True, False])
@pytest.mark.parametrize("shapes", SHAPES)
def test_tensors_are_those_of_bitsandbytes(tmp_path: Path, shapes: str, as_bin: bool) -> None:
    folder = make(tmp_path / "hf", **SHAPES[shapes])
    wanted = quantize(folder, as_bin=as_bin)
    checkpoint = Checkpoint.open(folder)
    heads = config_for(folder).num_attention_heads
    found = 0
    for index in checkpoint.indices:
        (held,) = checkpoint.shards(index)
        for name, tensor in held.tensors.items():
            theirs = held.names[name]
            joined = [theirs.replace("{q,k,v}", letter) for letter in "qkv"]
            parts = [wanted[part] for part in dict.fromkeys(joined)]
            whole = parts[0] if len(parts) == 1 else interleave(heads, parts)
            assert torch.equal(tensor, whole), name
            if whole.dim() == 2:
                assert torch.equal(held.eight_bit[name].dequantize(), whole), name
                found += 1
    assert len(checkpoint.shards(2)[0].eight_bit) == 4
    assert found == 2 * 4 + 2


@pytest.mark.parametrize("tp", [1, 2])
def test_computes_what_transformers_does_with_the_dequantized_weights(
    tmp_path: Path, world: World, tp: int
) -> None:
    theirs, ours = tmp_path / "dequantized", tmp_path / "hivemind"
    for folder in (theirs, ours):
        make(folder, model_type="gptj")
    save_all(theirs, quantize(ours), as_bin=False)
    for found in world.run(tp, logits, str(ours), tp):
        assert_close(found, their_logits(theirs, TOKENS), **CLOSE)


def test_nothing_is_dequantized_to_be_described(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(weight: EightBit, dtype: Any = None) -> Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(EightBit, "dequantize", refuse)
    summary = summarize(Checkpoint.open(folder))
    assert summary.kind == "a transformers folder, of 8-bit weights"
    assert summary.parameters == sum(t.numel() for t in stored_values(folder))
    with pytest.raises(AssertionError, match="dequantized"):
        Checkpoint.open(folder).shards(0)[0].tensors["word_embeddings.weight"]


def stored_values(folder: Path) -> list[Tensor]:
    tensors = torch.load(folder / "pytorch_model.bin")
    return [t for name, t in tensors.items() if not name.endswith((".absmax", ".code"))]


def eight_bit_rank(rank: int, folder: str, tp: int) -> dict[str, Tensor]:
    """The codes, the scales and the numbers of what one rank holds in memory, by layer and name."""
    groups = SINGLE if tp == 1 else initialize(Topology(tp=tp), "gloo", torch.device("cpu"))
    frozen = Frozen(torch.float32, groups, storage="8bit")
    config = config_for(folder, tp)
    checkpoint = Checkpoint.open(Path(folder))
    model = layers(config, ROWS, torch.float32, groups, frozen=frozen)
    held = {}
    for index, names in PATHS.items():
        module = model[index].build()
        checkpoint.load_into(module, model[index], groups)
        for name in names:
            weight = module.get_submodule(f"{name}.weight")
            held[f"{index}.{name}.codes"] = weight.codes.clone()
            held[f"{index}.{name}"] = weight.dequantize()
    return held


@pytest.mark.parametrize("tp", [1, 2])
def test_codes_go_into_memory_as_they_are_stored(folder: Path, world: World, tp: int) -> None:
    model = layers(config_for(folder), ROWS, torch.float32, SINGLE)
    checkpoint = Checkpoint.open(folder)
    for rank, held in enumerate(world.run(tp, eight_bit_rank, str(folder), tp)):
        for index, names in PATHS.items():
            (stored_shard,) = checkpoint.shards(index)
            for name in names:
                layout = (model[index].layout or {})[f"{name}.weight"]
                kept = stored_shard.eight_bit[f"{name}.weight"]
                codes = shard(kept.codes, layout, rank, tp)
                assert torch.equal(held[f"{index}.{name}.codes"], codes), name
                numbers = shard(kept.dequantize(), layout, rank, tp)
                assert torch.equal(held[f"{index}.{name}"], numbers), name


def test_tables_that_differ_are_read_as_numbers_only(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors["transformer.h.0.attn.k_proj.code"] = torch.linspace(-1, 1, 256)
    torch.save(tensors, path)
    (held,) = Checkpoint.open(folder).shards(2)
    name = "attention.query_key_value.weight"
    assert name not in held.eight_bit
    keys = held.tensors[name].unflatten(0, (4, 3, -1))[:, 1].flatten(0, 1)
    state = bnb.QuantState(
        tensors["transformer.h.0.attn.k_proj.absmax"],
        code=tensors["transformer.h.0.attn.k_proj.code"],
        blocksize=4096,
        dtype=torch.float32,
    )
    codes = tensors["transformer.h.0.attn.k_proj.weight"]
    assert torch.equal(keys, bnb.dequantize_blockwise(codes, state))


_FC = "transformer.h.0.mlp.fc_in"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{_FC}.absmax"), rf"incomplete: it holds no {_FC}\.absmax"),
    "no table": (lambda t: t.pop(f"{_FC}.code"), rf"incomplete: it holds no {_FC}\.code"),
    "no codes": (lambda t: t.pop(f"{_FC}.weight"), rf"incomplete: it holds no {_FC}\.weight"),
    "other scales": (
        lambda t: t.update({f"{_FC}.absmax": torch.ones(2)}),
        rf"{_FC}\.absmax is float32 \[2\], but beside codes \[128, 32\] it has to be float32 \[1\]",
    ),
    "scales of 16 bits": (
        lambda t: t.update({f"{_FC}.absmax": torch.ones(1).half()}),
        rf"{_FC}\.absmax is float16 \[1\]",
    ),
    "another table": (
        lambda t: t.update({f"{_FC}.code": torch.ones(16)}),
        rf"{_FC}\.code is float32 \[16\]",
    ),
    "no codes but numbers": (
        lambda t: t.update({f"{_FC}.weight": t[f"{_FC}.weight"].float()}),
        rf"{_FC}\.weight is float32 \[128, 32\], but the codes of a matrix are uint8",
    ),
    "codes of another shape": (
        lambda t: t.update({f"{_FC}.weight": t[f"{_FC}.weight"][:, :16].contiguous()}),
        r"mlp\.linear1\.weight",
    ),
    "codes without the rest": (
        lambda t: [t.pop(f"{_FC}.{kind}") for kind in ("absmax", "code")],
        rf"{_FC}\.weight holds uint8 numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    harm(tensors)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load_model(config_for(folder), SINGLE)


def test_older_buffers_are_left_aside(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    for index in range(2):
        block = f"transformer.h.{index}.attn"
        tensors[f"{block}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        tensors[f"{block}.masked_bias"] = torch.tensor(-1e9)
    before = load_model(config_for(folder), SINGLE)(TOKENS)
    torch.save(tensors, path)
    assert before is not None
    assert torch.equal(load_model(config_for(folder), SINGLE)(TOKENS), before)


def test_a_folder_of_parts_keeps_a_weight_in_several(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", model_type="gptj")
    quantize(folder, as_bin=False)
    whole = load_file(folder / "model.safetensors")
    expected = load_model(config_for(folder), SINGLE)(TOKENS)
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    weight_map = {name: names[place % 3] for place, name in enumerate(sorted(whole))}
    for file in names:
        part = {name: whole[name] for name, at in weight_map.items() if at == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert expected is not None
    assert torch.equal(load_model(config_for(folder), SINGLE)(TOKENS), expected)
