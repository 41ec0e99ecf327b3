"""Examples to fine-tune on: what is made of a text, a prompt with its completion, a conversation.

Each becomes token ids and a label for every one of them, MASKED where nothing is to be learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from neox.config.values import listed, show
from neox.data.corpus import Record
from neox.data.documents import MASKED
from neox.data.recipes import ChatRecipe, Tokenizer
from neox.errors import DataError

TEXT = ("text",)
PROMPT = ("prompt", "completion")
CHATS = (("messages",), ("conversations",), ("conversation",))
# The other way in which conversations are written, {"from": "human", "value": "..."}.
_ROLES = {"human": "user", "gpt": "assistant"}


class Example(NamedTuple):
    """`prompt`: how many of its first tokens may go when it is too long for a sample."""

    tokens: list[int]
    labels: list[int]
    prompt: int = 0

    @property
    def learnt(self) -> int:
        """How many labels count. The first token's never does: nothing comes before it."""
        return sum(label >= 0 for label in self.labels[1:])

    def cut(self, room: int) -> Example:
        """At most `room` tokens of it.

        A prompt loses its beginning, what it has beyond half the room; if that is not enough, and
        where there is no prompt, the end goes.
        """
        completion = len(self.tokens) - self.prompt
        kept = min(self.prompt, max(room - completion, room // 2))
        start = self.prompt - kept
        return Example(self.tokens[start : start + room], self.labels[start : start + room], kept)


class Template(Protocol):
    """What writes conversations as text: neox.tokenizer.chat's, for one."""

    def write(self, turns: Sequence[dict[str, Any]], next_speaks: bool) -> str: ...


def kind_of(record: Record) -> tuple[str, ...]:
    """The keys that make it an example: TEXT, PROMPT or one of CHATS. DataError: not one of them.

    Other keys are not read.
    """
    if isinstance(record.value, str):
        return TEXT
    found = [keys for keys in (TEXT, PROMPT, *CHATS) if all(key in record.value for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        both = listed((_quoted(keys) for keys in found), "and")
        raise DataError(f"{record.where} has {both}: which of them is the example? Keep one")
    for key, other in (PROMPT, PROMPT[::-1]):
        if key in record.value:
            raise DataError(f'{record.where} has a "{key}", but no "{other}"')
    raise DataError(
        f'{record.where} is no example: it has {_quoted(record.value) or "no keys"}, but "text", '
        '"prompt" and "completion", "messages", or "conversations" is needed'
    )


def _quoted(keys: Any) -> str:
    return listed((show(key) for key in keys), "and") if keys else ""


class ExampleEncoder:
    """Makes examples of records. One file holds one kind, which its first record tells."""

    def __init__(self, tokenizer: Tokenizer, template: Callable[[str], Template]) -> None:
        """`template` is asked when there is a conversation, and told where."""
        self._tokenizer = tokenizer
        self._template = template
        self._chats: dict[str, ChatRecipe] = {}
        # What a tokenizer begins every text with: a completion goes on with one.
        self._beginning = list(tokenizer.tokenize_batch([""])[0])
        self._first: dict[str, tuple[tuple[str, ...], str]] = {}

    def encode(self, file: str, record: Record) -> Example | None:
        """The example of a record of `file`; None where there is no text to be learnt.

        DataError naming the record: it is none, or of another kind than the file's first one.
        """
        kind = kind_of(record)
        first, where = self._first.setdefault(file, (kind, record.where))
        if kind != first:
            raise DataError(
                f"{record.where} has {_quoted(kind)}, but {where} has {_quoted(first)}: the "
                "examples of one file are of one kind; divide it"
            )
        if kind == TEXT:
            return self._text(record)
        if kind == PROMPT:
            return self._prompt(record)
        return self._chat(record, *kind)

    def _text(self, record: Record) -> Example | None:
        (text,) = record.texts(TEXT)
        text = text.removeprefix("\ufeff")
        if not text.strip():
            return None
        (ids,) = self._ids(record, text)
        tokens = self._ended(ids)
        return Example(tokens, tokens)

    def _prompt(self, record: Record) -> Example | None:
        """The prompt is tokenized by itself, as it will be when the model is to continue it."""
        prompt, completion = record.texts(PROMPT)
        if not completion.strip():
            return None
        before, after = self._ids(record, prompt, completion)
        after = self._ended(self._without_beginning(after))
        return Example(before + after, [MASKED] * len(before) + after, len(before))

    def _chat(self, record: Record, key: str) -> Example:
        if key not in self._chats:
            writer = _ChatTokenizer(self, self._template(record.where))
            self._chats[key] = ChatRecipe(writer, (key,))
        ((tokens, labels),) = self._chats[key].rows([_with_roles(record, key)])
        return Example(tokens, labels)

    def _ids(self, record: Record, *texts: str) -> list[list[int]]:
        for text in texts:
            if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"{record.where}: half a surrogate pair, which is no text ({error.reason})"
                    ) from None
        return self._tokenizer.tokenize_batch(texts)

    def _ended(self, ids: list[int]) -> list[int]:
        """Ended by the end-of-document token, once."""
        return ids if ids[-1:] == [self._tokenizer.eod] else [*ids, self._tokenizer.eod]

    def _without_beginning(self, ids: list[int]) -> list[int]:
        n = len(self._beginning)
        return ids[n:] if ids[:n] == self._beginning else ids


class _ChatTokenizer:
    """Conversations in the words of a template and the ids of the model's own tokenizer."""

    def __init__(self, encoder: ExampleEncoder, template: Template) -> None:
        self._encoder = encoder
        self.write = template.write
        self.vocab_size = encoder._tokenizer.vocab_size
        self.eos: int | None = encoder._tokenizer.eod

    def tokenize(self, text: str) -> list[int]:
        """Nothing is added, since a template writes the special tokens itself."""
        (ids,) = self._encoder._tokenizer.tokenize_batch([text])
        return self._encoder._without_beginning(ids)


def _with_roles(record: Record, key: str) -> Record:
    """With "role" and "content" in each turn, where it has "from" and "value"."""
    assert isinstance(record.value, dict)
    turns = record.value[key]
    if not isinstance(turns, list):
        return record

    def renamed(turn: Any) -> Any:
        if not isinstance(turn, dict) or "role" in turn or not {"from", "value"} <= turn.keys():
            return turn
        speaker = turn["from"]
        role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": turn["value"]}

    return Record(record.where, {key: [renamed(turn) for turn in turns]})
