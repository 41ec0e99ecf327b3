"""Text to token ids and back, by the tokenizer that the configuration names."""

from neox.tokenizer.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

__all__ = ["Tokenizer", "build_tokenizer", "load_tokenizer"]
