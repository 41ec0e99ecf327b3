"""What is made of a document: the token ids of one or several datasets, and their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from neox.data.corpus import Record
from neox.data.documents import MASKED
from neox.data.indexed import token_dtype
from neox.errors import DataError

Rows = Iterator[tuple[list[int], ...]]


class Tokenizer(Protocol):
    """What preprocessing asks of a tokenizer; it is pickled to the worker processes."""

    vocab_size: int
    eod: int

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class ChatTokenizer(Protocol):
    """What preprocessing asks of a tokenizer with a chat template; pickled as well."""

    vocab_size: int
    eos: int | None

    def write(self, turns: Sequence[dict[str, Any]], next_speaks: bool) -> str:
        """The text; `next_speaks`: with the words that make the model begin its turn."""
        ...

    def tokenize(self, text: str) -> list[int]: ...


class Recipe(Protocol):
    """Makes documents of records; lives in each process that tokenizes."""

    @property
    def names(self) -> list[str]:
        """Of the datasets that are written, PREFIX_NAME_document; those of labels come last."""
        ...

    @property
    def labels(self) -> int:
        """How many of them are labels."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the ids, in every dataset."""
        ...

    def rows(self, records: Sequence[Record]) -> Rows:
        """For each record one document per name. DataError naming what cannot be used."""
        ...


@dataclass(frozen=True)
class TextRecipe:
    """The texts under some keys, each key a dataset of its own.

    With `mask_before`, labels as well: those of a text up to the end of the first place where these
    ids stand are masked; none are where they do not stand.
    """

    tokenizer: Tokenizer
    keys: Sequence[str] = ("text",)
    append_eod: bool = False
    fix_text: bool = False  # repair broken encodings with the ftfy package
    mask_before: Sequence[int] | None = None

    @property
    def names(self) -> list[str]:
        if self.mask_before is None:
            return list(self.keys)
        # As upstream names the one it can make; of several keys, as its chat tool names them.
        labels = ["label"] if len(self.keys) == 1 else [f"{key}_label" for key in self.keys]
        return [*self.keys, *labels]

    @property
    def labels(self) -> int:
        return 0 if self.mask_before is None else len(self.keys)

    @property
    def dtype(self) -> np.dtype:
        # Labels can be negative, and upstream gives the tokens beside them the same type.
        labelled = self.mask_before is not None
        return np.dtype(np.int32) if labelled else token_dtype(self.tokenizer.vocab_size)

    def rows(self, records: Sequence[Record]) -> Rows:
        texts = [
            _usable(record, text, self.fix_text)
            for record in records
            for text in record.texts(self.keys)
        ]
        ids = iter(self.tokenizer.tokenize_batch(texts))
        for _ in records:
            row = [next(ids) for _ in self.keys]
            if not any(row):  # an empty document, but one record stays one record of every key
                continue
            if self.append_eod:
                row = [[*tokens, self.tokenizer.eod] for tokens in row]
            if self.mask_before is not None:
                row += [mask_through(tokens, self.mask_before) for tokens in row]
            yield tuple(row)


def mask_through(tokens: list[int], pattern: Sequence[int]) -> list[int]:
    """The tokens as labels, masked up to the end of the first `pattern`, if there is one."""
    wanted, start = list(pattern), 0
    while True:
        try:
            start = tokens.index(wanted[0], start)
        except ValueError:
            return tokens
        end = start + len(wanted)
        if tokens[start:end] == wanted:
            return [MASKED] * end + tokens[end:]
        start += 1


@dataclass(frozen=True)
class ChatRecipe:
    """Conversations, written out by a chat template; only what the model said is learnt.

    Each key gives a dataset of tokens and, unless nothing is masked, one of labels.
    """

    tokenizer: ChatTokenizer
    keys: Sequence[str] = ("conversation",)
    role: str = "assistant"  # whose turns are learnt
    only_last: bool = False  # and of these only the one that ends the conversation
    mask: bool = True
    fix_text: bool = False

    @property
    def names(self) -> list[str]:
        return [*self.keys, *(f"{key}_label" for key in self.keys if self.mask)]

    @property
    def labels(self) -> int:
        return len(self.keys) if self.mask else 0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32)  # as upstream's, labelled or not

    def rows(self, records: Sequence[Record]) -> Rows:
        for record in records:
            texts, labels = [], []
            for key in self.keys:
                turns = _turns(record, key, self.fix_text)
                try:
                    # Roles and other fields are written, too: they have to be text as well.
                    text = _usable(record, self.tokenizer.write(turns, False), fix_text=False)
                    tokens = self.tokenizer.tokenize(text)
                    if self.mask:
                        tokens, learnt = self._learnt(turns, text, tokens)
                        labels.append(learnt)
                except DataError as error:
                    raise DataError(f'{record.where}: "{key}": {error}') from None
                texts.append(tokens)
            yield (*texts, *labels)

    def _learnt(
        self, turns: list[dict[str, Any]], text: str, tokens: list[int]
    ) -> tuple[list[int], list[int]]:
        """(tokens, labels), both ended by the end-of-sequence token if there is one.

        A turn is what the template adds for it. The words that make the model begin its turn stand
        at the end of the turn before, and so are not learnt.
        """
        last = len(turns) - 1
        learnt = [
            turn["role"] == self.role and (i == last or not self.only_last)
            for i, turn in enumerate(turns)
        ]
        labels: list[int] = []
        for i, is_learnt in enumerate(learnt):
            if i < last and is_learnt == learnt[i + 1]:
                continue  # both are treated alike: where one ends and the next begins is the same
            start, end = len(labels), len(tokens)
            if i < last:
                speaks = turns[i + 1]["role"] == self.role
                end = max(start, self._end(turns[: i + 1], speaks, text, tokens))
            labels += tokens[start:end] if is_learnt else [MASKED] * (end - start)
        if self.tokenizer.eos is not None:
            labels.append(self.tokenizer.eos if learnt[last] else MASKED)
            tokens = [*tokens, self.tokenizer.eos]
        return tokens, labels

    def _end(
        self, turns: list[dict[str, Any]], next_speaks: bool, text: str, tokens: list[int]
    ) -> int:
        """How many of a conversation's `tokens` write its first `turns`.

        A token that joins their end with what follows is not among them. Some templates end a
        conversation with a token of its own; one that writes the turns in other words once more
        follow leaves nothing to count.
        """
        text_alone = self.tokenizer.write(turns, next_speaks)
        alone = self.tokenizer.tokenize(text_alone)
        pairs = zip(alone, tokens, strict=False)
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(tokens)))
        if end < len(alone) - 1 and not text.startswith(text_alone):
            raise DataError(
                f"the chat template writes the first {len(turns)} turns otherwise once turn "
                f"{len(turns) + 1} follows (from token {end} of {len(alone)} on), so that nothing "
                "tells which tokens are whose. tools/preprocess_data_with_chat_template.py asks "
                "less of it with --only-last, nothing with --no-mask"
            )
        return end


def _turns(record: Record, key: str, fix_text: bool) -> list[dict[str, Any]]:
    turns = record.get(key)
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns
    )
    if not good or not turns:
        raise DataError(
            f'{record.where}: "{key}" is no conversation; a list such as '
            '[{"role": "user", "content": "..."}, ...] is needed, of one turn at least'
        )
    return [
        turn | {"content": _usable(record, turn["content"], fix_text)}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]


def _usable(record: Record, text: str, fix_text: bool) -> str:
    """The text with its encoding repaired, if that is asked for. DataError: it is none."""
    if fix_text:
        text = _ftfy()(text)
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.where}: half a surrogate pair, which is no text ({error.reason}); "
            "tools/preprocess_data.py replaces it with --ftfy"
        ) from None
    return text


def _ftfy() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        raise DataError("--ftfy needs a package: pip install ftfy") from None
    return fix_text
