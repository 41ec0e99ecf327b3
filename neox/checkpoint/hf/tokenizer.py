"""A tokenizer's files as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from neox import log
from neox.config import NeoXConfig, hf

_KINDS = ("HFTokenizer", "HFGPT2Tokenizer", "GPT2BPETokenizer")


class Tokenizer(Protocol):
    """What an export asks of a tokenizer of neox.tokenizer."""

    vocab_size: int
    eod: int
    pad: int | None


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """As config.json and generation_config.json have them; a document begins as the last ended."""
    eod, pad = (None, None) if tokenizer is None else (tokenizer.eod, tokenizer.pad)
    return {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": pad}


def tokenizer_files(config: NeoXConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files by name; none for a kind of tokenizer that has none there, with a line about it.

    `tokenizer` is the one that `config` names. Raises OSError and ConfigError.
    """
    paths = _paths(config)
    if not paths:
        log.warning(
            f"the folder has no tokenizer: transformers has no files of {config.tokenizer_type}'s"
        )
        return {}
    texts = _texts(hf.read_json(next(iter(paths.values()))))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if hf.TOKENIZER in paths else "GPT2Tokenizer",
        "bos_token": texts[tokenizer.eod],
        "eos_token": texts[tokenizer.eod],
        "pad_token": texts.get(tokenizer.pad),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    files = {name: path.read_bytes() for name, path in paths.items()}
    return {**files, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}


def _paths(config: NeoXConfig) -> dict[str, Path]:
    """Transformers' names of the files that a configuration names; the vocabulary first."""
    if config.vocab_file is None or config.tokenizer_type not in _KINDS:
        return {}
    vocab = Path(config.vocab_file)
    if config.tokenizer_type == "GPT2BPETokenizer":
        return {"vocab.json": vocab, "merges.txt": Path(config.merge_file or "")}
    if vocab.is_file():
        return {hf.TOKENIZER: vocab}
    if (vocab / hf.TOKENIZER).is_file():
        return {hf.TOKENIZER: vocab / hf.TOKENIZER}
    return {name: vocab / name for name in ("vocab.json", "merges.txt")}


def _texts(vocabulary: dict[str, Any]) -> dict[int | None, str]:
    """The text of each id, from a tokenizer.json or a vocab.json."""
    if "model" not in vocabulary:
        return {token: text for text, token in vocabulary.items()}
    pieces = vocabulary["model"]["vocab"]
    if isinstance(pieces, dict):
        texts = {token: text for text, token in pieces.items()}
    else:  # Unigram: the n-th of [text, score]
        texts = {token: text for token, (text, _) in enumerate(pieces)}
    added = {token["id"]: token["content"] for token in vocabulary.get("added_tokens", [])}
    return texts | added
