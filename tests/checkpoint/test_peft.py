"""PEFT computes from our adapters what we do, and we from PEFT's; what we cannot is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from neox.checkpoint.directory import write_checkpoint
from neox.checkpoint.hf.export import export
from neox.checkpoint.manifest import digest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import (
    Adapters,
    fill,
    find_adapter,
    merged,
    read_adapters,
    with_adapter,
    write_adapters,
)
from neox.checkpoint.reshard import reshard
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.model.frozen import Frozen
from neox.model.gpt import layers
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.checkpoint import hf_folders, peft_folders
from tests.checkpoint.peft_folders import GPT_J, MATRICES, NEOX, our_logits, random_adapters
from tests.models import ARCHITECTURES, VOCAB, config_of, tokens, write_model
from tests.world import World

CLOSE = {"rtol": 0.0, "atol": 1e-5}
SINGLE = ProcessGroups.single()

# What PEFT was told -> which of (biases, norms) it has trained.
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[bool, bool]]] = {
    "list": (
        NEOX,
        {
            "target_modules": ["query_key_value", "dense", "lm_head"],
            "rank_pattern": {"query_key_value": 2},
            "alpha_pattern": {"layers.1.attention.dense": 3},
        },
        (False, False),
    ),
    "biases_and_norms": (
        NEOX,
        {
            "target_modules": ["dense_4h_to_h", "dense"],
            "bias": "all",
            "modules_to_save": ["input_layernorm", "final_layer_norm"],
        },
        (True, True),
    ),
    "expression": (
        ARCHITECTURES["sequential"],
        {
            "target_modules": r".*\.1\.(attention|mlp)\.dense.*",
            "use_rslora": True,
            "bias": "lora_only",
        },
        (True, False),
    ),
    "layers": (
        NEOX,
        {
            "target_modules": ["query_key_value", "dense_h_to_4h"],
            "layers_to_transform": [1],
            "safe": False,
        },
        (False, False),
    ),
    "norms": (
        ARCHITECTURES["no_bias"],
        {"target_modules": "all-linear", "modules_to_save": ["1.post_attention_layernorm"]},
        (False, True),
    ),
    "gpt_j": (
        GPT_J,
        {
            "target_modules": ["q_proj", "v_proj", "fc_in", "lm_head"],
            "bias": "all",
            "modules_to_save": ["ln_1", "ln_f"],
        },
        (True, True),
    ),
    "tied": (
        ARCHITECTURES["tied"],
        {"target_modules": ["dense"], "embeddings": True},
        (False, False),
    ),
    "gpt_j_ranks": (
        GPT_J,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_out"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"v_proj": 16, "h.0.attn.q_proj": 3},
        },
        (False, False),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_of_peft_give_its_logits_here(name: str, tmp_path: Path) -> None:
    values, settings, (biases, norms) = THEIRS[name]
    checkpoint, config = peft_folders.base(tmp_path, **values)
    folder = peft_folders.make(tmp_path, **settings)
    adapters = read_adapters(folder, config, VOCAB)
    assert (adapters.biases, adapters.norms) == (biases, norms)
    found = our_logits(checkpoint, config, adapters, tokens())
    assert_close(found, peft_folders.their_logits(tmp_path, folder, tokens()), **CLOSE)
    assert (found - our_logits(checkpoint, config, None, tokens())).abs().max() > 0.01
    whole = merged(checkpoint, adapters, peft_folders.model(config, None, SINGLE))
    assert_close(our_logits(whole, config, None, tokens()), found, **CLOSE)


@pytest.mark.parametrize(
    "name", ["neox", "sequential", "one_norm", "tied", "no_bias", "grouped_queries", "gpt_j"]
)
def test_peft_computes_our_logits(name: str, tmp_path: Path) -> None:
    checkpoint, config = peft_folders.base(tmp_path, **ARCHITECTURES[name])
    head = config.no_weight_tying
    adapters = random_adapters(config, head=head, biases=True, norms=True)
    write_adapters(tmp_path, config, adapters, str(tmp_path / "hf"))
    with warnings.catch_warnings():  # of tensors that have no place, or lack
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        found = peft_folders.their_logits(tmp_path, tmp_path, tokens())
    assert_close(our_logits(checkpoint, config, adapters, tokens()), found, **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_to_the_last_bit(name: str, tmp_path: Path) -> None:
    config = config_of(**ARCHITECTURES[name])
    head = config.no_weight_tying
    for number, adapters in enumerate(
        [
            random_adapters(config, head=head, biases=True, norms=True),
            random_adapters(config, MATRICES[1:3]),
            random_adapters(config, head=head, biases=True),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        written = write_adapters(folder, config, adapters, None)
        assert {name: digest(folder / name) for name in written} == written
        assert_same(read_adapters(folder, config, VOCAB), adapters)
        assert write_adapters(tmp_path, config, adapters, None) == written


def test_of_some_layers_and_of_several_ranks_in_16_bits(tmp_path: Path) -> None:
    config = config_of(num_layers=3)
    whole = random_adapters(config, norms=True)
    specs = {key: spec for key, spec in whole.specs.items() if key != (3, "attention.dense")}
    tensors = {
        (index, name): tensor.bfloat16()
        for (index, name), tensor in whole.tensors.items()
        if (index, name.partition(".adapter.")[0]) in specs
        or (index, name.rpartition(".")[0]) == (4, "input_layernorm")
    }
    write_adapters(tmp_path, config, Adapters(specs, tensors), None)
    assert_same(read_adapters(tmp_path, config, VOCAB), Adapters(specs, tensors))


def test_alpha_is_the_number_that_it_was(tmp_path: Path) -> None:
    config = config_of()
    for alpha in (1, 7.25, 3):
        adapters = random_adapters(config, ("mlp.linear1",), rank=49, alpha=alpha)
        write_adapters(tmp_path, config, adapters, None)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert settings["r"] == 49 and settings["lora_alpha"] == pytest.approx(alpha, rel=1e-15)
        assert isinstance(settings["lora_alpha"], type(alpha))
        assert_same(read_adapters(tmp_path, config, VOCAB), adapters)


def test_numbers_beyond_float16_are_refused() -> None:
    config = config_of()
    adapters = random_adapters(config, biases=True)
    adapters.tensors[2, "mlp.linear2.bias"][3] = 1e6
    frozen = Frozen(torch.float16, SINGLE, specs=adapters.specs)
    layer = layers(config, VOCAB, torch.float16, SINGLE, frozen=frozen)[2]
    with pytest.raises(CheckpointError, match="of layer 02 has numbers that float16"):
        fill(layer.build(), layer, adapters, SINGLE)


def assert_same(found: Adapters, expected: Adapters) -> None:
    assert found.specs == expected.specs
    hf_folders.assert_same_tensors(
        {str(key): tensor for key, tensor in found.tensors.items()},
        {str(key): tensor for key, tensor in expected.tensors.items()},
    )


def test_a_line_tells_that_peft_has_no_such_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("window", "llama"):
        config = config_of(**ARCHITECTURES[name])
        write_adapters(tmp_path, config, random_adapters(config), None)
    first, second = capsys.readouterr().out.splitlines()
    assert "PEFT cannot load" in first and "sliding_window_width is 4" in first
    assert "exported as llama" in second


def compare_shards(rank: int, folder: Path, names: list[str]) -> None:
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    for name in names:
        checkpoint = Checkpoint.open(folder / name)
        config = config_of(world_size=2, model_parallel_size=2, **ARCHITECTURES[name])
        adapters = read_adapters(folder / name, config, VOCAB)
        found = our_logits(checkpoint, config, adapters, tokens(), groups)
        one = config_of(**ARCHITECTURES[name])
        expected = our_logits(checkpoint, one, adapters, tokens())
        assert_close(found, expected.chunk(2, -1)[rank], **CLOSE)


def test_two_shards_are_the_whole(tmp_path: Path, world: World) -> None:
    names = ["neox", "sequential", "gpt_j", "grouped_queries", "geglu"]
    for name in names:
        write_model(tmp_path / name, 1, **ARCHITECTURES[name])
        config = config_of(**ARCHITECTURES[name])
        adapters = random_adapters(config, head=True, biases=True, norms=True)
        write_adapters(tmp_path / name, config, adapters, None)
    world.run(2, compare_shards, tmp_path, names)


@pytest.mark.parametrize("name", ["neox", "sequential", "gpt_j", "llama"])
def test_merged_at_any_number_of_shards(name: str, tmp_path: Path) -> None:
    values = ARCHITECTURES[name]
    write_model(tmp_path / "one", 1, **values)
    one, config = Checkpoint.open(tmp_path / "one"), config_of(**values)
    adapters = random_adapters(config, head=True, biases=True, norms=True)
    write_adapters(tmp_path, config, adapters, None)
    expected = our_logits(one, config, adapters, tokens())
    two = config_of(world_size=2, model_parallel_size=2, **values)
    reshard(one, tmp_path / "two", two, VOCAB)
    for source, target in (("one", two), ("two", two), ("two", config)):
        checkpoint = with_adapter(Checkpoint.open(tmp_path / source), config, tmp_path)
        output = tmp_path / f"{source}_{target.tp}"
        reshard(checkpoint, output, target, VOCAB, as_recorded=False)
        found = Checkpoint.open(output)
        assert found.tp == target.tp
        assert_close(our_logits(found, config, None, tokens()), expected, **CLOSE)


def test_an_export_with_adapters_in_it(tmp_path: Path) -> None:
    write_model(tmp_path / "base", 1)
    checkpoint, config = Checkpoint.open(tmp_path / "base"), config_of()
    adapters = random_adapters(config, head=True, biases=True)
    write_adapters(tmp_path, config, adapters, None)
    export(with_adapter(checkpoint, config, tmp_path), config, tmp_path / "hf")
    found = hf_folders.their_logits(tmp_path / "hf", tokens())
    assert_close(found, our_logits(checkpoint, config, adapters, tokens()), **CLOSE)


def test_rows_of_the_vocabulary_are_padded_and_dropped(tmp_path: Path) -> None:
    config = config_of()
    adapters = random_adapters(config, head=True)
    write_adapters(tmp_path, config, adapters, None)
    key = (config.num_layers + 4, "final_linear.adapter.lora_B")
    for rows in (VOCAB - 4, VOCAB + 4):
        found = read_adapters(tmp_path, config, rows).tensors[key]
        expected = torch.zeros(rows, 5)
        expected[:VOCAB] = adapters.tensors[key][:rows]
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        ({"target_modules": ["dense", "lm_head"]}, {"final_linear.weight"}),
        (
            {"target_modules": ["dense"], "embeddings": True},
            {"final_linear.weight", "word_embeddings.weight"},
        ),
    ],
)
def test_adapters_of_another_base_are_found_out(
    settings: dict[str, Any], copied: set[str], tmp_path: Path
) -> None:
    peft_folders.base(tmp_path)
    folder = peft_folders.make(tmp_path, **settings)
    config = config_of()
    adapters = read_adapters(folder, config, VOCAB)
    assert {name for _, name in adapters.copies} == copied
    write_model(tmp_path / "other", 1, seed=1)
    other = Checkpoint.open(tmp_path / "other")
    for use in (
        lambda: our_logits(other, config, adapters, tokens()),
        lambda: with_adapter(other, config, folder),
    ):
        with pytest.raises(CheckpointError, match=r"base's \S+.weight differs .* by up"):
            use()


def test_where_adapters_are(tmp_path: Path) -> None:
    config = config_of()
    step = write_checkpoint(
        tmp_path,
        7,
        lambda folder: write_adapters(folder, config, random_adapters(config), None),
        {},
        SINGLE,
        grid={"tp": 1, "pp": 1, "dp": 1},
        padded_vocab_size=VOCAB,
        architecture=architecture(config),
    )
    assert find_adapter(tmp_path) == find_adapter(step) == step
    path = step / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged"):
        read_adapters(step, config, VOCAB)
    (step / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="which `latest` names, holds no adapter"):
        find_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        find_adapter(step)
    write_model(tmp_path / "whole", 1)
    with pytest.raises(CheckpointError, match="it is no checkpoint of adapters"):
        find_adapter(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"no `latest`; it holds configs, layer_00"):
        find_adapter(tmp_path / "whole" / "global_step1")
    with pytest.raises(CheckpointError, match="is not a folder"):
        find_adapter(tmp_path / "nowhere")
