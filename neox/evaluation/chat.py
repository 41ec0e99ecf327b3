"""The chat template that `apply_chat_template` puts prompts into."""

from __future__ import annotations

import functools
from pathlib import Path

from neox.config import NeoXConfig
from neox.errors import ConfigError, DataError
from neox.tokenizer.chat import ChatTemplate, load_chat_template

# Reading a folder takes a moment, and a run asks twice.
_load = functools.cache(load_chat_template)


def chat_template_of(config: NeoXConfig) -> ChatTemplate | None:
    """That of chat_template_path or of vocab_file's folder; None without `apply_chat_template`.

    ConfigError when there is none.
    """
    if not config.apply_chat_template:
        return None
    if config.chat_template_path is not None:
        try:
            return _load(config.chat_template_path)
        except DataError as error:
            raise ConfigError(f"chat_template_path: {error}") from error
    reason = "there is no vocab_file to look beside"
    if config.vocab_file is not None and Path(config.vocab_file).exists():
        path = Path(config.vocab_file)
        try:
            return _load(str(path if path.is_dir() else path.parent))
        except DataError as error:
            reason = str(error).rstrip(".")
    raise ConfigError(
        f"apply_chat_template is true without chat_template_path, and {reason}. Set "
        "chat_template_path to the folder of a chat model's tokenizer"
    )
