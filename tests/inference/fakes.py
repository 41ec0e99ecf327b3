"""A model and a tokenizer small enough to know what they must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neox.config import NeoXConfig, from_dict
from neox.errors import RequestError
from neox.inference.cache import CacheView, KVCache
from neox.parallel.groups import ProcessGroups

VOCABULARY = 264  # the tokenizer's 257 padded to a multiple of 8


def config(**values: Any) -> NeoXConfig:
    model = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "tokenizer_type": "CharLevelTokenizer",
        "text_gen_type": "unconditional",
    }
    return from_dict(model | values)


class ByteTokenizer:
    """A token per byte of UTF-8, and the end of document."""

    name = "bytes"
    vocab_size = 257
    eod = 256

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def mixed(history: list[int]) -> Tensor:
    """Logits that depend on every token so far and on their order; the end is unlikely."""
    state = 0
    for token in history:
        state = (state * 31 + token + 7) % 10007
    logits = 2.0 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(state))
    logits[256:] = -30.0
    return logits


def script(prompt_length: int, tokens: Sequence[int]) -> Callable[[list[int]], Tensor]:
    """Logits that make the greedy choice `tokens`, one after another, past the prompt."""

    def logits(history: list[int]) -> Tensor:
        generated = len(history) - prompt_length
        token = tokens[generated] if 0 <= generated < len(tokens) else 0
        return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).float()

    return logits


def histories(tokens_BS: Tensor, cache: CacheView | None) -> list[list[int]]:
    """All tokens of each row; the earlier ones are known from the cache alone, as keys."""
    if cache is None:
        return tokens_BS.tolist()
    rows = []
    memory_RT = cache.layer(0).keys_RKTD[:, 0, :, 0]
    for tokens_S, row, length in zip(
        tokens_BS, cache.span.rows_B, cache.span.lengths_B, strict=True
    ):
        stop = length + len(tokens_S)
        memory_RT[row, length:stop] = tokens_S.float()
        rows.append(memory_RT[row, :stop].int().tolist())
    return rows


class FakeModel:
    """An InferenceModel whose logits are a function of the tokens so far."""

    is_source = True
    device = torch.device("cpu")
    padded_vocab_size = VOCABULARY

    def __init__(
        self,
        config: NeoXConfig,
        logits: Callable[[list[int]], Tensor] = mixed,
        groups: ProcessGroups | None = None,
    ) -> None:
        self.config = config
        self.groups = groups or ProcessGroups.single("cpu")
        self.shapes: list[tuple[int, ...]] = []
        self.rows: list[list[int]] = []  # of the cache, in each pass
        self.selected: str | None = None
        self._logits = logits

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        return KVCache(1, rows, 1, max_length, 1, torch.float32, "cpu")

    def select(self, adapter: str | None) -> None:
        if adapter not in (None, "a", "b"):
            raise RequestError(f"there is no adapter {adapter!r} here")
        self.selected = adapter

    def __call__(
        self, tokens_BS: Tensor, cache: CacheView | None = None, *, logits: str = "all"
    ) -> Tensor | None:
        self.shapes.append(tuple(tokens_BS.shape))
        self.rows.append([] if cache is None else cache.span.rows_B.tolist())
        assert tokens_BS.dtype == torch.int64
        rows = histories(tokens_BS, cache)
        if logits == "none":
            return None
        first = -1 if logits == "last" else -tokens_BS.shape[1]
        ends_BS = [range(len(row) + first + 1, len(row) + 1) for row in rows]
        return torch.stack(
            [
                torch.stack([self._logits(row[:end]) for end in ends])
                for row, ends in zip(rows, ends_BS, strict=True)
            ]
        )

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
