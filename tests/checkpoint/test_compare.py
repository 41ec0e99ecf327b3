"""What is the same in two checkpoints: bits, numbers, shapes, names, architecture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from neox.checkpoint.compare import (
    Comparison,
    Verdict,
    compare,
    compare_architectures,
    compare_tensors,
    conclusion,
)
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import reshard
from neox.checkpoint.sources import layer_file
from neox.errors import CheckpointError
from tests.checkpoint.test_reshard import at, write_shards
from tests.models import VOCAB, config_of, random_weights, write_model

CONFIG = config_of()


def differences(first: Checkpoint, second: Checkpoint) -> list[Comparison]:
    found = list(compare(first, CONFIG, second, CONFIG))
    return [each for each in found if each.verdict is not Verdict.BITWISE]


@pytest.fixture
def first(tmp_path: Path) -> Checkpoint:
    write_model(tmp_path / "first", 5)
    return Checkpoint.open(tmp_path / "first")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_do_not_matter(first: Checkpoint, tmp_path: Path, tp: int) -> None:
    reshard(first, tmp_path / "second", at(tp), VOCAB)
    assert differences(first, Checkpoint.open(tmp_path / "second")) == []


def test_a_number_that_differs_is_found(first: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["3.mlp.linear2.bias"][7] += 0.25
    weights["5.norm.bias"][0] = math.nan
    second = write_shards(tmp_path / "second", 2, weights)
    found = differences(first, second)
    assert [(each.layer, each.name, each.verdict) for each in found] == [
        (3, "mlp.linear2.bias", Verdict.DIFFERENT),
        (5, "norm.bias", Verdict.DIFFERENT),
    ]
    assert found[0].largest == pytest.approx(0.25)
    assert math.isnan(found[1].largest)
    assert str(found[0]) == "layer 03 mlp.linear2.bias: different by up to 0.25"


def test_another_precision_is_compared_by_value(first: Checkpoint, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in random_weights(CONFIG).items()}
    floats = {name: tensor.float() for name, tensor in halves.items()}
    half = write_shards(tmp_path / "half", 1, halves)
    wide = write_shards(tmp_path / "wide", 1, floats)
    assert {each.verdict for each in differences(half, wide)} == {Verdict.VALUES}
    rounded = differences(first, half)
    assert {each.verdict for each in rounded} == {Verdict.DIFFERENT}
    assert max(each.largest for each in rounded) < 1e-3
    assert rounded[0].detail == "float32 and float16"


def test_another_padding_is_told_from_other_rows(first: Checkpoint, tmp_path: Path) -> None:
    reshard(first, tmp_path / "second", CONFIG, VOCAB + 32)
    found = differences(first, Checkpoint.open(tmp_path / "second"))
    assert [each.name for each in found] == ["word_embeddings.weight", "final_linear.weight"]
    assert {each.verdict for each in found} == {Verdict.SHAPES}
    assert found[0].detail == "[64, 32] and [96, 32]; the first 64 rows are bitwise equal"


def test_layers_that_only_one_has_are_named(first: Checkpoint, tmp_path: Path) -> None:
    write_model(tmp_path / "second", 5, num_layers=3)
    deeper, second = config_of(num_layers=3), Checkpoint.open(tmp_path / "second")
    found = list(compare(first, CONFIG, second, deeper))
    only = {(each.layer, each.verdict) for each in found if not each.verdict.is_same}
    assert {(7, Verdict.ONLY_SECOND), (4, Verdict.ONLY_SECOND), (5, Verdict.ONLY_FIRST)} <= only
    assert compare_architectures(first, second) == [
        "num_layers is 2 (global_step5/manifest.json) and 3 (global_step5/manifest.json)"
    ]


def test_an_activation_is_part_of_a_model(first: Checkpoint, tmp_path: Path) -> None:
    write_model(tmp_path / "second", 5, bias_gelu_fusion=True)
    second = Checkpoint.open(tmp_path / "second")
    assert differences(first, second) == []
    (found,) = compare_architectures(first, second)
    assert found.startswith("bias_gelu_fusion is false")


def test_a_damaged_file_is_no_difference(first: Checkpoint, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "second", 5)
    path = layer_file(folder, 3, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        differences(first, Checkpoint.open(tmp_path / "second"))


@pytest.mark.parametrize(
    ("one", "other", "verdict", "largest"),
    [
        ([math.nan, math.inf], [math.nan, math.inf], Verdict.BITWISE, 0.0),
        ([0.0, 1.0], [-0.0, 1.0], Verdict.VALUES, 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], Verdict.DIFFERENT, math.inf),
        ([1.0, 2.0], [1.0, 2.5], Verdict.DIFFERENT, 0.5),
        ([math.nan, 2.0], [math.nan, 2.5], Verdict.DIFFERENT, 0.5),
        ([], [], Verdict.BITWISE, 0.0),
    ],
)
def test_special_numbers(
    one: list[float], other: list[float], verdict: Verdict, largest: float
) -> None:
    found = compare_tensors(torch.tensor(one), torch.tensor(other))
    assert found == (verdict, largest, "")


def test_a_difference_beyond_the_first_chunk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.checkpoint.compare._CHUNK", 4)
    one, other = torch.zeros(10), torch.zeros(10)
    one[1], other[9] = 0.5, 3.0
    assert compare_tensors(one, other) == (Verdict.DIFFERENT, 3.0, "")
    one[5] = math.nan
    assert math.isnan(compare_tensors(one, other)[1])


def test_the_conclusion_counts() -> None:
    verdicts = [Verdict.DIFFERENT, Verdict.BITWISE, Verdict.BITWISE]
    found = [Comparison(2, "norm.bias", verdict) for verdict in verdicts]
    assert conclusion(found) == "3 tensors: 2 bitwise equal, 1 different"
