"""Text to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import derived, key


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer and its files."""

    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "HFGPT2Tokenizer",
        "SPMTokenizer",
        "CharLevelTokenizer",
        "TiktokenTokenizer",
    ] = key(
        "GPT2BPETokenizer",
        "Kind of tokenizer.",
    )
    vocab_file: str | None = key(
        None, "The vocabulary: a tokenizers .json, GPT-2's vocab.json, or a model file."
    )
    merge_file: str | None = key(None, "GPT-2's merges, for GPT2BPETokenizer.")
    padded_vocab_size: int | None = derived(
        None, "Rows of the embedding.", "the tokenizer and make_vocab_size_divisible_by set it"
    )
