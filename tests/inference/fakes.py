"""A model and a tokenizer small enough to know what they must answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neox.config import NeoXConfig, from_dict
from neox.inference.cache import KVCache
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
        return bytes(ids).decode(errors="replace")


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


class FakeModel:
    """An InferenceModel whose logits are a function of the tokens so far.

    With a cache the earlier tokens are known from the cache alone, as keys.
    """

    is_last_stage = True
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
        self._logits = logits

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(1, batch_size, 1, max_length, 1, torch.float32, "cpu")

    def __call__(
        self, tokens_BS: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        self.shapes.append(tuple(tokens_BS.shape))
        assert tokens_BS.dtype == torch.int64 and tokens_BS.size(0) == 1
        history = tokens_BS[0].tolist()
        start = 0
        if cache is not None:
            start = cache.length
            keys = tokens_BS[:, None, :, None].float()
            history = cache.layer(0).append(keys, keys)[0].flatten().int().tolist()
            cache.advance(tokens_BS.size(1))
        ends = range(start + 1, len(history) + 1)
        logits_BSV = torch.stack([self._logits(history[:end]) for end in ends])[None]
        return logits_BSV[:, -1:] if last_only else logits_BSV

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
