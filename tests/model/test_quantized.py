"""8-bit weights: bitsandbytes' numbers, whatever the shape and however they are cut."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

from neox.model.layout import Init, ParamLayout, Split
from neox.model.quantized import (
    EightBit,
    cut,
    from_blocks,
    join_rows,
    multiply,
    multiply_back,
    quantize,
)
from neox.model.shard import shard

SHAPES = [(64, 64), (12, 4096), (6, 8192), (100, 48), (3, 12288), (7, 5), (257, 96)]


def weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator) * 0.02


def theirs(whole: torch.Tensor) -> torch.Tensor:
    codes, state = quantize_blockwise(whole, blocksize=4096)
    dequantized: torch.Tensor = dequantize_blockwise(codes, state)
    return dequantized


@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    whole = weight(*shape)
    made = quantize(whole)
    assert torch.equal(made.dequantize(), theirs(whole))
    assert made.group == math.gcd(4096, shape[1])


def test_large_weights_are_quantized_in_pieces_of_whole_blocks() -> None:
    whole = weight(4100, 4160)
    made = quantize(whole)
    assert torch.equal(made.dequantize(), theirs(whole))
    pieces = torch.cat([dense for _, dense in made.pieces(torch.float32)])
    assert torch.equal(pieces, made.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_the_rounded_ones(dtype: torch.dtype) -> None:
    made = quantize(weight(64, 64).to(dtype))
    assert torch.equal(made.dequantize(dtype), made.dequantize().to(dtype))


@pytest.mark.parametrize("shape", [(64, 64), (8, 4096), (100, 48), (4, 10)])
@pytest.mark.parametrize("split", [Split.COLUMN, Split.ROW])
def test_shards_have_the_numbers_of_the_whole(shape: tuple[int, int], split: Split) -> None:
    layout = ParamLayout(shape, split, Init.WEIGHT)
    whole = quantize(weight(*shape))
    for rank in range(2):
        mine = cut(whole, layout, rank, 2)
        assert torch.equal(mine.dequantize(), shard(whole.dequantize(), layout, rank, 2))


def test_fused_blocks_are_cut_each() -> None:
    layout = ParamLayout((16, 32), Split.COLUMN, Init.WEIGHT, blocks=(8, 4, 4))
    whole = quantize(weight(16, 32))
    mine = cut(whole, layout, 1, 2)
    assert torch.equal(mine.dequantize(), shard(whole.dequantize(), layout, 1, 2))


def test_joined_rows_keep_their_scales() -> None:
    parts = [quantize(weight(rows, 96)) for rows in (3, 50, 7)]
    joined = join_rows(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_stored_tensors_of_bitsandbytes_are_taken_as_they_are() -> None:
    whole = weight(33, 160)
    codes, state = quantize_blockwise(whole, blocksize=4096)
    held = from_blocks(codes, state.absmax, state.code)
    assert torch.equal(held.dequantize(), dequantize_blockwise(codes, state))


def test_products_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox.model.quantized._PIECE", 8 * 48)  # 8 rows at a time
    held = quantize(weight(100, 48))
    dense = held.dequantize()
    x, grad = torch.randn(2, 5, 48), torch.randn(2, 5, 100)
    torch.testing.assert_close(multiply(x, held), x @ dense.t())
    torch.testing.assert_close(multiply_back(grad, held), grad @ dense)
    rows = torch.tensor([[3, 99], [0, 3]])
    assert torch.equal(held.look_up(rows, torch.float32), dense[rows])


def test_casting_a_model_leaves_the_scales_alone() -> None:
    held = quantize(weight(64, 64))
    before = held.dequantize()
    assert torch.equal(held.bfloat16().dequantize(), before)


def test_a_place_is_filled_once_there_is_a_weight() -> None:
    place = EightBit.empty(64, 64)
    held = quantize(weight(64, 64))
    place.assign(held)
    assert torch.equal(place.dequantize(), held.dequantize())
    with pytest.raises(AssertionError):
        EightBit.empty(64, 32).assign(held)
