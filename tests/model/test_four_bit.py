"""bitsandbytes' 4 bits, which CUDA devices get: here as the library computes them on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.model.four_bit import BLOCK, FourBit, quantize_to_4
from neox.model.frozen import Frozen, Storage
from neox.model.gpt import Layer, build_layers, layers
from neox.model.layout import Init, ParamLayout, Split
from neox.model.quantized import EightBit
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups
from tests.models import VOCAB, config_of, forward, tokens, write_model

SINGLE = ProcessGroups.single()
# Two neighbours of NF4's 16 numbers, -1 to 1, are at most 0.304 apart.
FURTHEST = 0.152


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("columns", [128, 72])  # whole blocks, and a last one that is padded
def test_numbers_are_the_nearest_of_sixteen(columns: int) -> None:
    dense = weight(10, columns)
    held = quantize_to_4(dense)
    assert (held.shape, held.codes.dtype) == (dense.shape, torch.uint8)
    assert held.codes.nbytes + held.scales.nbytes == 10 * (-(-columns // BLOCK)) * (32 + 4)
    blocks = F.pad(dense, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    assert torch.equal(held.scales, blocks.abs().amax(dim=-1))
    most = held.scales.repeat_interleave(BLOCK, dim=1)[:, :columns]
    found = held.dequantize()
    assert ((found - dense).abs() <= FURTHEST * most + 1e-6).all()
    assert len((found / most).unique().mul(1e4).round().unique()) <= 16


@pytest.mark.parametrize("columns", [128, 72])
def test_products_and_rows_are_those_of_the_numbers_held(columns: int) -> None:
    held, bias = quantize_to_4(weight(10, columns)), torch.arange(10.0)
    dense = held.dequantize()
    for shape in ((columns,), (1, columns), (2, 3, columns)):
        x = torch.randn(shape)
        assert_close(held.multiply(x, bias), F.linear(x, dense, bias), rtol=1e-5, atol=1e-5)
        half = held.multiply(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), F.linear(x, dense), rtol=0, atol=0.02 * columns**0.5)
    rows = torch.tensor([[3, 9], [0, 3]])
    assert torch.equal(held.look_up(rows, torch.float32), dense[rows])
    held.half()  # scales are no parameters to be cast
    assert torch.equal(held.dequantize(), dense)


@pytest.mark.parametrize("split", [Split.COLUMN, Split.ROW])
def test_a_shard_s_numbers_are_the_whole_weight_s(split: Split) -> None:
    dense = weight(8, 256)
    layout = ParamLayout((8, 256), split, Init.WEIGHT)
    whole = quantize_to_4(dense).dequantize()
    for rank in range(2):
        mine = quantize_to_4(shard(dense, layout, rank, 2)).dequantize()
        assert torch.equal(mine, shard(whole, layout, rank, 2))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize_to_4(torch.tensor([[1.0, torch.nan]]))


@pytest.mark.parametrize(("storage", "kind"), [("int8", EightBit), ("int4", FourBit)])
def test_a_model_for_cuda_has_them(tmp_path: Path, storage: Storage, kind: type) -> None:
    write_model(tmp_path, 1)
    checkpoint = Checkpoint.open(tmp_path)
    cuda = replace(SINGLE, device=torch.device("cuda"))

    def logits(frozen: Frozen | None) -> torch.Tensor:
        model = layers(config_of(), VOCAB, torch.float32, SINGLE, frozen=frozen)

        def load(module: nn.Module, layer: Layer) -> None:
            checkpoint.load_into(module, layer, SINGLE)

        stage = build_layers(model, load)
        if frozen is not None:
            held = [
                m for _, layer in stage if isinstance(layer, nn.Module) for m in layer.modules()
            ]
            # Four matrices a layer and the projection; the table of tokens has 8 bits.
            assert sum(isinstance(part, kind) for part in held) == (10 if kind is EightBit else 9)
        with torch.inference_mode():
            return forward(stage, tokens())

    exact, found = logits(None), logits(Frozen(torch.float32, cuda, storage))
    error = (found - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < (0.05 if storage == "int8" else 0.3)
