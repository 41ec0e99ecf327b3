"""Resharding: any number of files to any tp, exactly."""

from __future__ import annotations

import pytest
import torch

from neox.model.layout import Init, ParamLayout, Split, pad_vocab_size, transformer_layout
from neox.model.shard import file_shard, reshard, shard
from tests.models import config_of

SIZES = (1, 2, 4, 8)


def layouts() -> dict[str, ParamLayout]:
    return {
        "column": ParamLayout((16, 3), Split.COLUMN, Init.WEIGHT),
        "column_bias": ParamLayout((16,), Split.COLUMN, Init.ZEROS),
        "row": ParamLayout((3, 16), Split.ROW, Init.WEIGHT),
        "grouped": ParamLayout((32, 3), Split.COLUMN, Init.WEIGHT, blocks=(16, 8, 8)),
        "gated": ParamLayout((32,), Split.COLUMN, Init.ZEROS, blocks=(16, 16)),
        "replicated": ParamLayout((5,), Split.REPLICATED, Init.ONES),
        "summand": ParamLayout((5,), Split.PARTIAL_SUM, Init.ZEROS),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("stored", SIZES)
@pytest.mark.parametrize("wanted", SIZES)
def test_files_of_any_number_of_shards_give_what_each_rank_holds(
    name: str, stored: int, wanted: int
) -> None:
    layout = layouts()[name]
    whole = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    files = [
        file_shard(shard(whole, layout, rank, stored), layout, rank, stored)
        for rank in range(stored)
    ]
    for rank in range(wanted):
        held = reshard(files, layout, rank, wanted)
        assert held.shape == layout.shard_shape(wanted)
        assert torch.equal(held, shard(whole, layout, rank, wanted))


def test_a_fused_shard_is_the_concatenation_of_the_blocks_shards() -> None:
    layout = layouts()["grouped"]
    whole = torch.arange(32.0)[:, None].expand(32, 3)
    held = shard(whole, layout, 1, 2)[:, 0].tolist()
    assert held == [*range(8, 16), *range(20, 24), *range(28, 32)]


def test_summands_are_added_and_replicas_averaged() -> None:
    summand, replica = layouts()["summand"], layouts()["replicated"]
    a, b = torch.full((5,), 1.0), torch.full((5,), 4.0)
    assert reshard([a, b], summand, 0, 1).tolist() == [5.0] * 5
    assert reshard([a, b], replica, 0, 1).tolist() == [2.5] * 5


@pytest.mark.parametrize("tp", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summands_add_up_exactly(dtype: torch.dtype, tp: int) -> None:
    """Also numbers so small that they have no half: 6e-8 is float16's smallest."""
    values = torch.tensor([1.0, 1 / 3, -6e-8, 1.8e-7, 3e-5, 65504.0, 0.0, 1e-38]).to(dtype)
    layout = ParamLayout(values.shape, Split.PARTIAL_SUM, Init.ZEROS)
    files = [file_shard(values, layout, rank, tp) for rank in range(tp)]
    assert torch.equal(reshard(files, layout, 0, 1), values)


def test_vocabulary_rows_are_padded_with_zeros_or_trimmed() -> None:
    stored = [torch.ones(4, 2), torch.full((4, 2), 2.0)]
    longer = ParamLayout((12, 2), Split.COLUMN, Init.WEIGHT, is_vocab=True)
    assert reshard(stored, longer, 0, 3).tolist() == [[1.0, 1.0]] * 4
    assert reshard(stored, longer, 2, 3).tolist() == [[0.0, 0.0]] * 4
    shorter = ParamLayout((6, 2), Split.COLUMN, Init.WEIGHT, is_vocab=True)
    assert reshard(stored, shorter, 0, 1)[:, 0].tolist() == [1, 1, 1, 1, 2, 2]


def test_the_result_is_a_copy_not_a_view_of_the_file() -> None:
    stored = [torch.zeros(4, 2)]
    held = reshard(stored, ParamLayout((4, 2), Split.COLUMN, Init.WEIGHT), 0, 1)
    held += 1
    assert stored[0].sum() == 0


def test_padded_vocabulary_of_the_published_models() -> None:
    assert pad_vocab_size(50277, 128, 1) == 50304
    assert pad_vocab_size(50277, 128, 2) == 50432  # GPT-NeoX-20B, trained at tp 2
    assert pad_vocab_size(128, 128, 1) == 128


def test_row_parallel_biases_are_summands_only_with_a_parallel_residual() -> None:
    for parallel, split in ((True, Split.PARTIAL_SUM), (False, Split.REPLICATED)):
        layout = transformer_layout(config_of(gpt_j_residual=parallel))
        assert layout["attention.dense.bias"].split is split
        assert layout["mlp.linear2.bias"].split is split
        assert layout["mlp.linear1.bias"].split is Split.COLUMN
