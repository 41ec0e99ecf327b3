"""Checkpoints at another number of shards: every value as it was, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox.checkpoint.lock import saving_alone
from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import choose_rows, reshard
from neox.checkpoint.sources import layer_file, load_model_file, model_file
from neox.checkpoint.verify import verify
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from tests.checkpoint.test_sources import write as write_model_files
from tests.models import (
    ARCHITECTURES,
    VOCAB,
    config_of,
    model_layers,
    random_weights,
    write_model,
)

SINGLE = ProcessGroups.single()


def at(tp: int, **values: Any) -> NeoXConfig:
    return config_of(world_size=tp, model_parallel_size=tp, **values)


def write_shards(folder: Path, tp: int, weights: dict[str, Tensor], **values: Any) -> Checkpoint:
    """Layer files as upstream writes them: no manifest, no mp_rank files."""
    folder.mkdir(parents=True)
    for layer in model_layers(config_of(**values), SINGLE):
        if not layer.has_file:
            continue
        assert layer.layout is not None
        for rank in range(tp):
            tensors = {}
            for name, layout in layer.layout.items():
                held = shard(weights[f"{layer.index}.{name}"], layout, rank, tp)
                tensors[name] = file_shard(held, layout, rank, tp)
            torch.save(tensors, layer_file(folder, layer.index, rank))
    return Checkpoint.open(folder)


def contents(checkpoint: Checkpoint) -> dict[tuple[int, int, str], Tensor]:
    """Every tensor of every file by layer, shard and the name in the file."""
    return {
        (index, rank, name): tensor.clone()
        for index in checkpoint.indices
        for rank in range(checkpoint.tp)
        for name, tensor in torch.load(
            layer_file(checkpoint.folder, index, rank), weights_only=True
        ).items()
    }


def assert_equal(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert list(one) == list(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key


def through(checkpoint: Checkpoint, directory: Path, sizes: list[int], **values: Any) -> Checkpoint:
    """Reshard again and again; each result is whole by its manifest."""
    for step, tp in enumerate(sizes):
        config = at(tp, **values)
        rows = choose_rows(checkpoint, config, None, None)
        folder = reshard(checkpoint, directory / f"{step}_{tp}", config, rows)
        assert verify(folder) == []
        checkpoint = Checkpoint.open(directory / f"{step}_{tp}")
        assert checkpoint.tp == tp
    return checkpoint


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    values = ARCHITECTURES[name]
    weights = random_weights(config_of(**values))
    start = write_shards(tmp_path / "global_step5", 2, weights, **values)
    sizes = [1, 2] if "num_kv_heads" in values else [1, 4, 2]
    end = through(start, tmp_path, sizes, **values)
    assert end.iteration == 5
    assert_equal(contents(start), contents(end))
    whole = Checkpoint.open(tmp_path / "0_1")
    for (index, _, key), tensor in contents(whole).items():
        assert torch.equal(tensor, weights[f"{index}.{key}"])


@pytest.mark.parametrize("start", [1, 2])
def test_summands_of_the_smallest_float16_numbers_come_back(tmp_path: Path, start: int) -> None:
    weights = {name: tensor.half() for name, tensor in random_weights(config_of()).items()}
    for name in weights:
        if name.endswith((".attention.dense.bias", ".mlp.linear2.bias")):
            # Multiples of 2^-24, float16's smallest: most have no half, let alone a quarter.
            weights[name] = torch.arange(-16, 16).to(torch.float16) * 2.0**-24
    first = write_shards(tmp_path / "global_step5", start, weights)
    end = through(first, tmp_path, [2, 1, 4, 2, start])
    assert_equal(contents(first), contents(end))
    whole = contents(Checkpoint.open(tmp_path / "1_1"))
    assert torch.equal(whole[2, 0, "mlp.linear2.bias"], weights["2.mlp.linear2.bias"])


def test_names_and_buffers_stay_as_found(tmp_path: Path) -> None:
    start = legacy(tmp_path)
    end = through(start, tmp_path, [1, 4, 2])
    assert_equal(contents(start), contents(end))
    assert (2, 1, "mlp.dense_h_to_4h.weight") in contents(end)
    assert (3, 0, "attention.rotary_emb.inv_freq") in contents(end)


def test_names_of_today_may_be_asked_for(tmp_path: Path) -> None:
    reshard(legacy(tmp_path), tmp_path / "new", at(2), VOCAB, todays_names=True)
    weights = random_weights(config_of())
    expected = write_shards(tmp_path / "expected" / "global_step5", 2, weights)
    assert_equal(contents(Checkpoint.open(tmp_path / "new")), contents(expected))


def legacy(directory: Path) -> Checkpoint:
    """Two shards with the names and buffers of the 20B era."""
    start = write_shards(directory / "global_step5", 2, random_weights(config_of()))
    for index in (2, 3):
        for rank in range(2):
            path = layer_file(start.folder, index, rank)
            tensors = {
                name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): tensor
                for name, tensor in torch.load(path, weights_only=True).items()
            }
            torch.save({**tensors, "attention.rotary_emb.inv_freq": torch.ones(2) / index}, path)
    return start


def test_a_norm_that_nothing_reads_is_carried(tmp_path: Path) -> None:
    """Upstream writes the second norm also where gpt_j_tied leaves it unused."""
    weights = random_weights(config_of())
    start = write_shards(tmp_path / "global_step5", 2, weights)
    end = through(start, tmp_path, [4, 2], gpt_j_tied=True)
    assert_equal(contents(start), contents(end))


def test_whole_model_files_become_layer_files(tmp_path: Path) -> None:
    write_model_files(tmp_path / "global_step20", {}, tp=2)
    end = through(Checkpoint.open(tmp_path / "global_step20"), tmp_path, [1])
    expected = write_shards(tmp_path / "expected" / "global_step20", 1, random_weights(config_of()))
    assert_equal(contents(end), contents(expected))


def test_replicas_and_summands_that_differ_stay_so_at_the_same_number(tmp_path: Path) -> None:
    start = write_shards(tmp_path / "global_step5", 2, random_weights(config_of()))
    path = layer_file(start.folder, 2, 1)
    tensors = torch.load(path, weights_only=True)
    norm = tensors["input_layernorm.weight"].clone()
    tensors["input_layernorm.weight"] += 2.0
    tensors["mlp.linear2.bias"] += 1.0
    torch.save(tensors, path)
    assert_equal(contents(start), contents(through(start, tmp_path / "same", [2])))
    whole = contents(through(start, tmp_path / "whole", [1]))
    summed = random_weights(config_of())["2.mlp.linear2.bias"] + 1.0
    torch.testing.assert_close(whole[2, 0, "input_layernorm.weight"], norm + 1.0)
    torch.testing.assert_close(whole[2, 0, "mlp.linear2.bias"], summed)


def test_the_run_goes_along_and_the_optimizer_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_files(tmp_path / "global_step20", {})
    (tmp_path / "global_step20/configs").mkdir()
    (tmp_path / "global_step20/configs/small.yml").write_text("# mine\n")
    end = through(Checkpoint.open(tmp_path / "global_step20"), tmp_path, [2])
    assert f"the optimizer state of {tmp_path / 'global_step20'} is left" in capsys.readouterr().out
    assert (end.folder / "configs/small.yml").read_text() == "# mine\n"
    for rank in range(2):
        state = load_model_file(model_file(end.folder, rank))
        assert (state["iteration"], state["mp_world_size"]) == (20, 2)
        assert (state["module"], state["optimizer"]) == (None, None)
        assert state["args"] == {"num_layers": 2}
    assert end.manifest is not None
    assert end.manifest.grid == {"tp": 2, "pp": 1, "dp": 1}
    assert end.manifest.architecture["num_attention_heads"] == 4
    (end.folder / MANIFEST).unlink()
    assert "manifest.json is missing" in verify(end.folder)[0]


@pytest.mark.parametrize(("asked", "tokens"), [(96, None), (60, 50)])
def test_other_rows_are_zeros_or_trimmed(tmp_path: Path, asked: int, tokens: int | None) -> None:
    values = {"use_bias_in_final_linear": True}
    write_model(tmp_path, 5, **values)
    checkpoint = Checkpoint.open(tmp_path)
    rows = choose_rows(checkpoint, at(4), asked, tokens)
    reshard(checkpoint, tmp_path / "new", at(4, **values), rows)
    new = Checkpoint.open(tmp_path / "new")
    assert new.padded_vocab_size == rows == asked
    assert new.manifest is not None and new.manifest.padded_vocab_size == asked
    weights = random_weights(config_of(**values))
    vocabulary = (
        (0, "word_embeddings.weight"),
        (6, "final_linear.weight"),
        (6, "final_linear.bias"),
    )
    for index, name in vocabulary:
        table = torch.cat([shard.tensors[name] for shard in new.shards(index)])
        kept = min(asked, VOCAB)
        assert torch.equal(table[:kept], weights[f"{index}.{name}"][:kept])
        assert not table[kept:].any()


def test_rows_follow_a_configuration_that_asks(tmp_path: Path) -> None:
    write_model(tmp_path, 5)
    checkpoint = Checkpoint.open(tmp_path)
    assert choose_rows(checkpoint, at(2), None, 50) == VOCAB
    other = at(2, make_vocab_size_divisible_by=25)
    assert choose_rows(checkpoint, other, None, 50) == 50
    with pytest.raises(CheckpointError, match=r"\(25\) does not divide the checkpoint's 64 rows"):
        choose_rows(checkpoint, other, None, None)


@pytest.mark.parametrize(
    ("tp", "asked", "tokens", "said"),
    [
        (4, 66, None, r"66 rows can't be cut into 4 .* --padded_vocab_size 68"),
        (1, 60, None, r"60 is less than the checkpoint's 64 .* Give a configuration with the tok"),
        (1, 60, 61, "the tokenizer has 61 tokens"),
    ],
)
def test_rows_that_cannot_be(
    tmp_path: Path, tp: int, asked: int, tokens: int | None, said: str
) -> None:
    write_model(tmp_path, 5)
    with pytest.raises(CheckpointError, match=said):
        choose_rows(Checkpoint.open(tmp_path), at(tp), asked, tokens)


def test_another_precision_adds_up_exactly(tmp_path: Path) -> None:
    write_model(tmp_path, 5)
    reshard(Checkpoint.open(tmp_path), tmp_path / "new", at(4), VOCAB, dtype=torch.float16)
    whole = contents(through(Checkpoint.open(tmp_path / "new"), tmp_path, [1]))
    for (index, _, name), tensor in whole.items():
        assert torch.equal(tensor, random_weights(config_of())[f"{index}.{name}"].half())


def test_a_precision_that_is_too_small_is_refused(tmp_path: Path) -> None:
    weights = random_weights(config_of())
    weights["3.mlp.linear1.bias"][5] = 7e4
    start = write_shards(tmp_path / "global_step5", 1, weights)
    with pytest.raises(CheckpointError, match=r"numbers of up to 7e\+04 .* float16, .* 6\.55e\+04"):
        reshard(start, tmp_path / "new", at(1), VOCAB, dtype=torch.float16)
    assert not (tmp_path / "new/latest").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_layers": 1}, "holds layer_03"),
        ({"no_weight_tying": False}, "holds layer_06-model_00-model_states.pt, for which"),
        ({"norm": "rmsnorm"}, "it lacks input_layernorm.scale"),
    ],
)
def test_what_the_architecture_does_not_have_is_not_dropped(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    write_model(tmp_path, 5)
    with pytest.raises(CheckpointError, match=said):
        reshard(Checkpoint.open(tmp_path), tmp_path / "new", at(2, **values), VOCAB)
    assert not (tmp_path / "new/latest").exists()


def test_a_damaged_file_is_not_copied(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 5)
    path = layer_file(folder, 3, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer_03-model_00\S* is damaged"):
        reshard(Checkpoint.open(tmp_path), tmp_path / "new", at(2), VOCAB)
    assert not (tmp_path / "new/global_step5").exists()


@pytest.mark.parametrize("output", [".", "link", "other"])
def test_a_checkpoint_is_not_written_over_itself_or_another(tmp_path: Path, output: str) -> None:
    write_model(tmp_path, 5)
    write_model(tmp_path / "other", 5)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="global_step5 is there already"):
        reshard(Checkpoint.open(tmp_path), tmp_path / output, at(2), VOCAB)


def test_a_run_that_saves_into_the_folder_is_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path, 5)
    unfinished = write_model(tmp_path / "run", 7).parent / ".unfinished/global_step9"
    unfinished.mkdir(parents=True)
    with (
        saving_alone(tmp_path / "run", ProcessGroups.single()),
        pytest.raises(CheckpointError, match="another run is saving"),
    ):
        reshard(Checkpoint.open(tmp_path, 5), tmp_path / "run", at(2), VOCAB)
    assert unfinished.exists()
