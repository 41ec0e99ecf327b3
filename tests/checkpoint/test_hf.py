"""Transformers folders: loaded at any tp, exported with a proof, imported bit for bit."""

from __future__ import annotations

import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.hf import export as exporting
from neox.checkpoint.hf.export import export
from neox.checkpoint.hf.importing import import_folder
from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig, from_dict, hf_classes, load_config
from neox.errors import CheckpointError, ConfigError, NeoXError
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.tokenizer import build_tokenizer
from tests import small_tokenizer
from tests.models import ARCHITECTURES, config_of, random_weights, tokens, write_model
from tests.reference import reference_logits
from tests.world import World

CLOSE = {"rtol": 0.0, "atol": 1e-5}
ROWS = 288  # of the vocabulary: what the small tokenizer's 280 tokens are padded to
TOKENS = torch.arange(24).reshape(2, 12) % ROWS

THEIRS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False, "hidden_act": "gelu_new"},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    "no_bias": {"attention_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "relu": {"hidden_act": "relu", "intermediate_size": 96},
}
GRIDS = [Topology(tp=2), Topology(pp=2, tp=2), Topology(tp=4)]
LLAMA = {**ARCHITECTURES["llama"], "rms_norm_epsilon": 1e-8}
EXPORTED: dict[str, dict[str, Any]] = {
    **{
        name: ARCHITECTURES[name]
        for name in (
            *("neox", "sequential", "one_norm", "tied", "tanh_gelu", "no_bias", "full_rotary"),
            *("sequential_no_bias", "mlp_bias_only", "grouped_queries", "relu", "mish"),
        )
    },
    "llama": LLAMA,
    "llama_biases": {
        **LLAMA,
        "num_kv_heads": None,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "no_weight_tying": False,
    },
    "mistral": {**LLAMA, "sliding_window_width": 4},
    "gpt2": {"pos_emb": "learned", "gpt_j_residual": False, "no_weight_tying": False},
    "gpt2_grouped": {
        "pos_emb": "learned",
        "gpt_j_residual": False,
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "bias_gelu_fusion": True,
    },
}


def make(folder: Path, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    """A folder as transformers writes it, of random weights and biases, with a tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shard_size = values.pop("max_shard_size", "1GB")
    config = GPTNeoXConfig(
        **{
            "vocab_size": ROWS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 16,
            **values,
        }
    )
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    small_tokenizer.write(folder)
    return folder


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(ids).logits


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


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


# --- loading


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_loads_with_nothing_but_its_name(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, **THEIRS[name])
    assert_close(load_here(folder), their_logits(folder, TOKENS), **CLOSE)


@pytest.mark.parametrize(
    "topology", [Topology(tp=2), Topology(pp=2, tp=2), Topology(tp=4)], ids=str
)
@pytest.mark.parametrize("name", ["parallel", "sequential", "tied"])
def test_a_folder_loads_at_any_grid(
    world: World, name: str, topology: Topology, tmp_path: Path
) -> None:
    folder = make(tmp_path, max_shard_size="40KB", **THEIRS[name])
    assert len(list(folder.glob("*.safetensors"))) > 2
    *_, last = world.run(topology.world_size, our_logits, str(folder), topology)
    assert_close(last, their_logits(folder, TOKENS), **CLOSE)


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


# --- damage


def truncate(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size if size > 0 else 0)


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


PART = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
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


# --- export


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_computes_the_same_from_an_export(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(**EXPORTED[name])
    write_model(tmp_path / "neox", 1, **EXPORTED[name])
    capfd.readouterr()
    export(Checkpoint.open(tmp_path / "neox"), config, tmp_path / "hf")
    said = capfd.readouterr()
    expected = reference_logits(config, random_weights(config), tokens())
    assert_close(their_logits(tmp_path / "hf", tokens()), expected, **CLOSE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "neox"]
    assert said.err == "" and "logits of transformers differ by" in said.out.splitlines()[-1]
    assert len(said.out.splitlines()) == 1 + ("grouped" in name)


@pytest.mark.parametrize("name", ["no_positions", "window", "geglu", "softsign", "learned"])
def test_a_model_of_no_class_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "neox", 1, **ARCHITECTURES[name])
    with pytest.raises(ConfigError, match="no class of transformers"):
        config = config_of(**ARCHITECTURES[name])
        export(Checkpoint.open(tmp_path / "neox"), config, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_a_large_epsilon_under_the_root_is_another_function(tmp_path: Path) -> None:
    values = ARCHITECTURES["llama"]  # its rms_norm_epsilon is 1e-5
    write_model(tmp_path / "neox", 1, **values)
    with pytest.raises(CheckpointError, match=r"rms_norm_epsilon \(1e-05\) is added to the root"):
        export(Checkpoint.open(tmp_path / "neox"), config_of(**values), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Checkpoint, NeoXConfig]:
    write_model(tmp_path / "neox", 1)
    return Checkpoint.open(tmp_path / "neox"), config_of()


def test_parts_are_no_larger_than_asked_and_hold_the_same(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    export(*checkpoint, tmp_path / "whole")
    export(*checkpoint, tmp_path / "parts", max_shard_bytes=20_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000
    tensors = stored(tmp_path / "parts")
    assert_same_tensors(tensors, stored(tmp_path / "whole"))
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert_close(
        their_logits(tmp_path / "parts", tokens()), their_logits(tmp_path / "whole", tokens())
    )


@pytest.mark.parametrize("name", ["neox", "sequential"])
def test_an_export_does_not_depend_on_the_shards(name: str, tmp_path: Path) -> None:
    config = config_of(**ARCHITECTURES[name])
    write_model(tmp_path / "tp1", 1, **ARCHITECTURES[name])
    export(Checkpoint.open(tmp_path / "tp1"), config, tmp_path / "hf1")
    step = import_folder(tmp_path / "hf1", tmp_path / "tp2", tp=2)
    assert len(list(step.glob("layer_*"))) == 2 * len(list((tmp_path / "tp1").glob("*/layer_*")))
    export(Checkpoint.open(tmp_path / "tp2"), config, tmp_path / "hf2")
    one, two = ((tmp_path / hf / "model.safetensors").read_bytes() for hf in ("hf1", "hf2"))
    assert one == two


def test_another_precision(checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path) -> None:
    export(*checkpoint, tmp_path / "fp32")
    export(*checkpoint, tmp_path / "bf16", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in stored(tmp_path / "fp32").items()}
    assert_same_tensors(stored(tmp_path / "bf16"), expected)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_only_one_tensor_is_held(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    make_one = exporting._make

    def watched(*arguments: Any) -> Tensor:
        assert not any(earlier() is not None for earlier in made)
        tensor = make_one(*arguments)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(exporting, "_make", watched)
    export(*checkpoint, tmp_path / "hf")
    assert len(made) == len(stored(tmp_path / "hf"))


def perturb(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.1.attention.dense.weight"][3, 5] += 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


WRONG = {
    "a number": (perturb, "differ by"),
    "a missing tensor": (
        lambda f: drop_tensor(f, "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
        "does not load it",
    ),
    "the residual": (lambda f: edit_config(f, use_parallel_residual=False), "differ by"),
    "the activation": (lambda f: edit_config(f, hidden_act="gelu_fast"), "differ by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_export_is_given_up(
    name: str,
    checkpoint: tuple[Checkpoint, NeoXConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, said = WRONG[name]
    prove = exporting.prove

    def spoil_first(checkpoint: Any, config: Any, folder: Path, dtype: Any) -> None:
        spoil(folder)
        prove(checkpoint, config, folder, dtype)

    monkeypatch.setattr(exporting, "prove", spoil_first)
    with pytest.raises(CheckpointError, match=said):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_the_proof_notices_a_gelu_that_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_classes, "_hidden_act", lambda config: "gelu")
    values = ARCHITECTURES["tanh_gelu"]
    write_model(tmp_path / "neox", 1, **values)
    with pytest.raises(CheckpointError, match="differ by"):
        export(Checkpoint.open(tmp_path / "neox"), config_of(**values), tmp_path / "hf")


def test_a_damaged_checkpoint_is_not_exported(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    file = tmp_path / "neox" / "global_step1" / "layer_03-model_00-model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


def test_what_is_there_is_never_overwritten(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    export(*checkpoint, tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for act in (
        lambda: export(*checkpoint, tmp_path / "hf"),
        lambda: import_folder(tmp_path / "hf", tmp_path / "hf"),
        lambda: export(*checkpoint, tmp_path / "hf" / "config.json"),
    ):
        with pytest.raises(CheckpointError, match="there already"):
            act()
    assert (tmp_path / "hf" / "config.json").read_bytes() == before


def test_a_full_disk_leaves_nothing_behind(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="hf cannot be written: No space left"):
        export(*checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


# --- tokenizers


TEXT = "the best<|endoftext|> of  times\n, \u00e9 it"


def with_tokenizer(folder: Path, kind: str) -> dict[str, Any]:
    path = small_tokenizer.write(folder)
    if kind == "HFTokenizer":
        return {"tokenizer_type": kind, "vocab_file": str(path)}
    model = json.loads(path.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    if kind == "HFGPT2Tokenizer":
        path.unlink()
        return {"tokenizer_type": kind, "vocab_file": str(folder)}
    files = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    return {"tokenizer_type": kind} | {key: str(folder / name) for key, name in files.items()}


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer", "HFGPT2Tokenizer"])
def test_the_tokenizer_goes_along(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    model = make(tmp_path / "theirs")
    (tmp_path / "files").mkdir()
    config = from_dict({"load": str(model), **with_tokenizer(tmp_path / "files", kind)})
    ours = build_tokenizer(config)
    export(Checkpoint.open(model), config, tmp_path / "hf", tokenizer=ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT)["input_ids"] == ours.tokenize(TEXT)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod, ours.eod) == (0, 0)
    assert theirs.pad_token_id == ours.pad == 1
    assert len(theirs) == ours.vocab_size
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert written["eos_token_id"] == generation.eos_token_id == 0
    assert written["pad_token_id"] == generation.pad_token_id == 1


def test_a_tokenizer_without_files_there_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "theirs", vocab_size=512)
    config = from_dict({"load": str(model), "tokenizer_type": "CharLevelTokenizer"})
    export(Checkpoint.open(model), config, tmp_path / "hf", tokenizer=build_tokenizer(config))
    assert "warning: the folder has no tokenizer" in capfd.readouterr().err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0


def test_a_tokenizer_that_is_too_large_is_refused(
    checkpoint: tuple[Checkpoint, NeoXConfig], tmp_path: Path
) -> None:
    config = config_of(**with_tokenizer(tmp_path, "HFTokenizer"))
    with pytest.raises(CheckpointError, match="has 280 tokens"):
        export(checkpoint[0], config, tmp_path / "hf", tokenizer=build_tokenizer(config))


# --- import


def halves_of_nothing(folder: Path) -> None:
    """Give every bias the smallest numbers there are, which have no half."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.copy_(torch.arange(tensor.numel()) * torch.finfo(tensor.dtype).smallest_normal)
            tensor.mul_(torch.finfo(tensor.dtype).eps)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["parallel", "sequential", "tied"])
def test_import_then_export_is_bitwise(
    name: str, dtype: torch.dtype, tp: int, tmp_path: Path
) -> None:
    folder = make(tmp_path / "theirs", dtype, **THEIRS[name])
    halves_of_nothing(folder)
    step = import_folder(folder, tmp_path / "neox", tp=tp)
    config = load_config([step / "configs" / "hf.yml"], purpose="generate")
    again = Checkpoint.open(Path(config.load or ""))
    assert (again.tp, again.iteration, again.padded_vocab_size) == (tp, 0, ROWS)
    export(again, config, tmp_path / "ours", tokenizer=build_tokenizer(config))
    assert_same_tensors(stored(tmp_path / "ours"), stored(folder))
    tokenizer = (tmp_path / "ours" / "tokenizer.json").read_bytes()
    assert tokenizer == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["parallel", "sequential"])
def test_an_imported_checkpoint_is_the_model(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", **THEIRS[name])
    step = import_folder(folder, tmp_path / "neox", tp=2)
    config = load_config([step / "configs" / "hf.yml"], purpose="evaluate")
    logits = load_model(config, ProcessGroups.single())(TOKENS)
    assert_close(logits, their_logits(folder, TOKENS), **CLOSE)
    (shard, _) = Checkpoint.open(step).shards(2)
    assert not shard.buffers and "mlp.linear1.weight" in shard.names.values()


def test_summands_of_a_bias_are_its_exact_sum(tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", torch.float16)
    halves_of_nothing(folder)
    step = import_folder(folder, tmp_path / "neox", tp=2)
    name = "attention.dense.bias"
    one, two = (shard.tensors[name] for shard in Checkpoint.open(step).shards(2))
    whole = load_file(folder / "model.safetensors")[f"gpt_neox.layers.0.{name}"]
    assert torch.equal(one + two, whole) and not torch.equal(one, two)


def test_a_tp_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not divisible"):
        import_folder(make(tmp_path / "theirs"), tmp_path / "neox", tp=3)
    assert not (tmp_path / "neox").exists()


def test_rows_that_tp_does_not_divide_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "theirs", vocab_size=287)
    with pytest.raises(CheckpointError, match="287 rows can't be cut into 2"):
        import_folder(folder, tmp_path / "neox", tp=2)
    assert not (tmp_path / "neox").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model of transformers"):
        import_folder(tmp_path, tmp_path / "neox")
