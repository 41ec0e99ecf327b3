"""The keys and values of the tokens seen so far: one explicit object that a forward pass is handed.

Shape letters: B batch rows, N key/value heads of this rank, S new tokens, T tokens so far,
D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one stage's layers, in memory allocated once and never moved.

    A forward pass appends to every layer at the same position, `length`, and then calls
    `advance`; until then the cache still describes the tokens before the pass.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        kv_heads_local: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, batch_size, kv_heads_local, max_length, head_dim)
        # Unset memory: nothing is read before it is written, and the system hands out its pages
        # only as the sequence grows.
        keys = torch.empty(shape, dtype=dtype, device=device)
        values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        self._layers = [LayerCache(self, k, v) for k, v in zip(keys, values, strict=True)]

    def layer(self, i: int) -> LayerCache:
        """The cache of the `i`-th layer of this stage that has attention, counted from 0."""
        return self._layers[i]

    def advance(self, n: int) -> None:
        """Count `n` more tokens as seen, once every layer has appended them."""
        assert self.length + n <= self.max_length, (
            f"{self.length} + {n} tokens exceed {self.max_length}"
        )
        self.length += n


class LayerCache:
    """One layer's part of a `KVCache`."""

    def __init__(self, cache: KVCache, keys_BNTD: Tensor, values_BNTD: Tensor) -> None:
        self._cache = cache
        self._keys_BNTD = keys_BNTD
        self._values_BNTD = values_BNTD

    @property
    def length(self) -> int:
        """Tokens seen before this forward pass: the position of the first new one."""
        return self._cache.length

    def append(self, k_BNSD: Tensor, v_BNSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new keys and values; return all T = length + S of each as views (BNTD)."""
        start = self._cache.length
        stop = start + k_BNSD.size(2)
        assert stop <= self._cache.max_length, (
            f"{stop} tokens exceed the cache's {self._cache.max_length}"
        )
        self._keys_BNTD[:, :, start:stop] = k_BNSD
        self._values_BNTD[:, :, start:stop] = v_BNSD
        return self._keys_BNTD[:, :, :stop], self._values_BNTD[:, :, :stop]
