"""A byte-level BPE tokenizer of a 280 entries, trained in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = "It was the best of times, it was the worst of times; the age of wisdom, of foolishness.\n"


def train(special: Sequence[str] = ("<|endoftext|>", "<|padding|>")) -> tokenizers.Tokenizer:
    """All 256 bytes, the special tokens (ids 0, 1, ...) and merges learned from `TEXT`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def write(folder: Path) -> Path:
    """Save the tokenizer as `folder`/tokenizer.json."""
    path = folder / "tokenizer.json"
    train().save(str(path))
    return path
