"""How many vocabulary rows a model has that is loaded from a checkpoint."""

from __future__ import annotations

from neox import log
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.model.layout import pad_vocab_size


def padded_vocab_size(config: NeoXConfig, stored: int, tokens: int | None) -> int:
    """The checkpoint's `stored` rows, unless the configuration asks for another number of them.

    Padding rows take part in the softmax like any other, so a model keeps those that it was trained
    with, at every tp. A configuration asks for others by a make_vocab_size_divisible_by of its own
    that does not divide the stored rows: then they are the tokenizer's `tokens`, padded to it; rows
    are trimmed, or added as zeros, and a line says so. `tokens` None, no tokenizer, asks nothing.
    Raises CheckpointError when the tokenizer has more tokens than there are rows.
    """
    multiple = config.make_vocab_size_divisible_by
    rows = stored
    if tokens is not None and asks_for_others(config, stored):
        rows = pad_vocab_size(tokens, multiple, config.tp)
        if rows != stored:
            log.info(
                f"vocabulary: make_vocab_size_divisible_by ({multiple}) makes it {rows} rows, and "
                f"the checkpoint's {stored} are not a multiple: "
                + (f"{stored - rows} trimmed" if rows < stored else f"{rows - stored} zeros added")
            )
    if tokens is not None:
        check_tokens(tokens, rows)
    return rows


def asks_for_others(config: NeoXConfig, stored: int) -> bool:
    """Whether the configuration says how to pad the vocabulary, and not as it is stored."""
    is_given = config.origin("make_vocab_size_divisible_by") != "default"
    return is_given and stored % config.make_vocab_size_divisible_by != 0


def check_tokens(tokens: int, rows: int) -> None:
    """Raises CheckpointError when a tokenizer has more tokens than a checkpoint has rows."""
    if tokens > rows:
        raise CheckpointError(
            f"the tokenizer has {tokens} tokens, but the checkpoint's vocabulary has {rows}: set "
            "tokenizer_type and vocab_file to the tokenizer that the model was trained with"
        )
