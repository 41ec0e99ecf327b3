"""The key/value cache: appends where it says, keeps its memory, refuses to overflow."""

from __future__ import annotations

import pytest
import torch

from neox.inference.cache import KVCache


def make(max_length: int = 8) -> KVCache:
    return KVCache(2, 3, 4, max_length, 5, torch.float32, "cpu")


def test_appended_pieces_read_back_as_one_sequence():
    cache = make()
    k = torch.randn(2, 3, 4, 8, 5)
    v = torch.randn(2, 3, 4, 8, 5)
    for start, stop in [(0, 3), (3, 4), (4, 8)]:
        for i in range(2):
            assert cache.layer(i).length == start
            keys, values = cache.layer(i).append(k[i][:, :, start:stop], v[i][:, :, start:stop])
            assert torch.equal(keys, k[i][:, :, :stop])
            assert torch.equal(values, v[i][:, :, :stop])
        cache.advance(stop - start)
    assert cache.length == 8


def test_memory_is_never_moved():
    cache = make()
    addresses = set()
    for _ in range(8):
        keys, _ = cache.layer(1).append(torch.ones(3, 4, 1, 5), torch.ones(3, 4, 1, 5))
        cache.advance(1)
        addresses.add(keys.data_ptr())
    assert len(addresses) == 1


def test_until_advanced_the_same_positions_are_written_again():
    cache = make()
    cache.layer(0).append(torch.ones(3, 4, 2, 5), torch.ones(3, 4, 2, 5))
    keys, values = cache.layer(0).append(torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5))
    assert keys.shape == values.shape == (3, 4, 2, 5)
    assert not keys.any() and not values.any()


def test_overflow_is_refused():
    cache = make(max_length=2)
    cache.advance(2)
    with pytest.raises(AssertionError, match="3 tokens exceed the cache's 2"):
        cache.layer(0).append(torch.ones(3, 4, 1, 5), torch.ones(3, 4, 1, 5))
    with pytest.raises(AssertionError, match="exceed 2"):
        cache.advance(1)
