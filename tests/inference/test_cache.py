"""The key/value cache: memory that stays where it is, and views that say what a pass does."""

from __future__ import annotations

import pytest
import torch

from neox.errors import ConfigError
from neox.inference.cache import KVCache
from neox.model.cached_attention import Run, attend_by_runs, attend_cached, attend_together


def make(rows: int = 3, max_length: int = 8) -> KVCache:
    cache = KVCache(2, rows, 4, max_length, 5, torch.float32, "cpu")
    for memory in (cache.keys_LRKTD, cache.values_LRKTD):
        memory.normal_(generator=torch.Generator().manual_seed(1))
    return cache


def test_a_view_has_the_positions_of_what_is_new():
    span = make().view([2, 0], [5, 1], 3).span
    assert span.rows_B.tolist() == [2, 0] and span.lengths_B.tolist() == [5, 1]
    assert span.positions_BS.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert span.stop == 8


def test_neighbours_of_one_length_are_one_run():
    span = make(rows=6).view([1, 2, 3, 5, 0], [4, 4, 2, 2, 2], 1).span
    assert span.runs == [
        Run(slice(0, 2), slice(1, 3), 4),
        Run(slice(2, 3), slice(3, 4), 2),
        Run(slice(3, 4), slice(5, 6), 2),
        Run(slice(4, 5), slice(0, 1), 2),
    ]


def test_overflow_is_refused():
    with pytest.raises(AssertionError, match="9 positions exceed 8"):
        make().view([0, 1], [1, 6], 3)


@pytest.mark.parametrize("window", [None, 0, 2, 3])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("attend", [attend_by_runs, attend_together])
@pytest.mark.parametrize(
    "rows, lengths", [([0, 1, 2], [4, 4, 4]), ([2, 0], [5, 0]), ([0, 1, 2], [0, 3, 5])]
)
def test_attention_is_its_definition(attend, rows, lengths, new, window):
    """With 8 query heads for 4 of keys and values."""
    cache = make()
    layer = cache.view(rows, lengths, new).layer(1)
    B = len(rows)
    q, k, v = (torch.randn(B, heads, new, 5) for heads in (8, 4, 4))
    got = attend(q, k, v, layer, window)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert torch.equal(cache.keys_LRKTD[1, row, :, length : length + new], k[b])
        assert torch.equal(cache.values_LRKTD[1, row, :, length : length + new], v[b])
        for head in range(8):
            keys_TD, values_TD = layer.keys_RKTD[row, head // 2], layer.values_RKTD[row, head // 2]
            for s in range(new):
                at = length + s
                seen = slice(0 if window is None else max(0, at - window), at + 1)
                weights = (keys_TD[seen] @ q[b, head, s] / 5**0.5).softmax(0)
                torch.testing.assert_close(got[b, head, s], weights @ values_TD[seen])


@pytest.mark.parametrize("kv_heads", [4, 8])
@pytest.mark.parametrize("new", [1, 33])
@pytest.mark.parametrize("lengths", [[300, 300, 300], [300, 7, 257]])
def test_a_row_gets_the_same_bits_in_any_company(lengths, new, kv_heads):
    def cache() -> KVCache:
        made = KVCache(1, 3, kv_heads, 340, 64, torch.float32, "cpu")
        for memory in (made.keys_LRKTD, made.values_LRKTD):
            memory.normal_(generator=torch.Generator().manual_seed(1))
        return made

    q, k, v = (torch.randn(3, heads, new, 64) for heads in (8, kv_heads, kv_heads))
    got = attend_cached(q, k, v, cache().view([0, 1, 2], lengths, new).layer(0), None)
    for b, length in enumerate(lengths):
        alone = cache().view([b], [length], new).layer(0)
        own = slice(b, b + 1)
        assert torch.equal(got[own], attend_cached(q[own], k[own], v[own], alone, None))


@pytest.mark.parametrize("attend", [attend_by_runs, attend_together])
def test_nothing_else_is_written(attend):
    cache, before = make(), make()
    layer = cache.view([2, 0], [5, 1], 2).layer(0)
    attend(*(torch.randn(2, 4, 2, 5) for _ in range(3)), layer, None)
    for memory, old in ((cache.keys_LRKTD, before.keys_LRKTD),) * 2:
        for row, new in ((2, slice(5, 7)), (0, slice(1, 3))):
            memory[0, row, :, new] = old[0, row, :, new]
        assert torch.equal(memory, old)


def test_a_row_that_is_copied_and_one_that_is_erased():
    cache, before = make(), make()
    cache.copy(2, 0, 2, 6)
    for memory, old in (
        (cache.keys_LRKTD, before.keys_LRKTD),
        (cache.values_LRKTD, before.values_LRKTD),
    ):
        assert torch.equal(memory[:, 0, :, 2:6], old[:, 2, :, 2:6])
        assert torch.equal(memory[:, 0, :, :2], old[:, 0, :, :2])
        assert torch.equal(memory[:, 0, :, 6:], old[:, 0, :, 6:])
    cache.erase(2)
    assert not cache.keys_LRKTD[:, 2].any() and not cache.values_LRKTD[:, 2].any()
    assert torch.equal(cache.keys_LRKTD[:, 1], before.keys_LRKTD[:, 1])


def test_more_than_there_is_memory_for_is_refused():
    with pytest.raises(
        ConfigError, match=r"1000000000 rows of 100 tokens take .* GiB .*serve_rows"
    ):
        KVCache(4, 10**9, 6, 100, 9, torch.float32, "cpu")
