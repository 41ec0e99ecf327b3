"""Text to token ids and back, by the tokenizer that the configuration names."""

from neox.tokenizer.tokenizer import (
    TYPES,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_digest,
)

__all__ = ["TYPES", "Tokenizer", "build_tokenizer", "load_tokenizer", "tokenizer_digest"]
