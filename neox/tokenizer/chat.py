"""Conversations as token ids, by the chat template of a tokenizer folder of transformers.

A template is a Jinja program; transformers runs it in a sandbox without access to Python's objects.
Tokenizers that need Python code of their own are refused: nothing of the folder is executed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neox.config import NeoXConfig


class ChatTemplate:
    """The tokenizer and template of one folder."""

    def __init__(self, folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self.vocab_size: int = len(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        self.source: str = tokenizer.get_chat_template()  # the template's own text
        self._tokenizer = tokenizer

    def write(self, turns: Sequence[dict[str, Any]], next_speaks: bool) -> str:
        """The text of a conversation; `next_speaks`: with the words that begin an answer.

        DataError: the template refuses the conversation.
        """
        return self._render(turns, add_generation_prompt=next_speaks)

    def prompt(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation that the model is to continue: with an answer, or its last turn's text.

        DataError: the template refuses the conversation.
        """
        return self._render(
            turns,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _render(self, turns: Sequence[dict[str, Any]], **options: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
        except Exception as error:  # whatever a program may raise, 1 // 0 included
            raise DataError(f"the chat template does not take these turns ({error})") from None

    def tokenize(self, text: str) -> list[int]:
        """Nothing is added, since a template writes the special tokens itself."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def __reduce__(self) -> tuple[Any, ...]:
        return load_chat_template, (self.folder,)  # a process of a pool reads the folder itself


def load_chat_template(folder: str) -> ChatTemplate:
    """DataError when the folder has no tokenizer that needs no code, or no chat template."""
    if not Path(folder).is_dir():
        raise DataError(
            f"{folder} is no folder; a chat template comes from one with tokenizer.json and "
            "tokenizer_config.json (tools/fetch.py brings one from the hub)"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, down to those of the tokenizers library
        raise DataError(f"{folder} has no tokenizer that transformers reads ({error})") from None
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder} has no chat template: neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json. Tokenizers of base models have none; take that of a chat model."
        )
    return ChatTemplate(folder, tokenizer)


# Reading a folder takes a moment, and a run asks more than once.
_load = functools.cache(load_chat_template)


_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def template_digest(config: NeoXConfig) -> str:
    """SHA-256 over the files that `find_chat_template` would take a template from."""
    hasher = hashlib.sha256()
    folder = _folder(config)
    for file in [folder / name for name in _FILES] if folder is not None else []:
        if file.is_file():
            hasher.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return hasher.hexdigest()


def _folder(config: NeoXConfig) -> Path | None:
    """Where a template is looked for; None where there is nothing to look beside."""
    if config.chat_template_path is not None:
        return Path(config.chat_template_path)
    path = Path(config.vocab_file or "")
    if config.vocab_file is None or not path.exists():
        return None
    return path if path.is_dir() else path.parent


def find_chat_template(config: NeoXConfig, wanted_because: str) -> ChatTemplate:
    """That of chat_template_path, or else of vocab_file's folder. ConfigError when there is none.

    `wanted_because` completes "... without chat_template_path, and there is no ...".
    """
    if config.chat_template_path is not None:
        try:
            return _load(config.chat_template_path)
        except DataError as error:
            raise ConfigError(f"chat_template_path: {error}") from error
    reason = "there is no vocab_file to look beside"
    folder = _folder(config)
    if folder is not None:
        try:
            return _load(str(folder))
        except DataError as error:
            reason = str(error).rstrip(".")
    raise ConfigError(
        f"{wanted_because} without chat_template_path, and {reason}. Set chat_template_path to the "
        "folder of a chat model's tokenizer"
    )


def chat_template_beside(config: NeoXConfig) -> ChatTemplate | None:
    """That of chat_template_path; without it, that of vocab_file's folder if there is one.

    ConfigError when chat_template_path has none. transformers is not imported to find nothing.
    """
    folder = _folder(config)
    if config.chat_template_path is None:
        if folder is None or not any((folder / name).is_file() for name in _FILES):
            return None
        try:
            return _load(str(folder))
        except DataError:
            return None
    return find_chat_template(config, "a chat is asked for")
