"""Many texts through a byte-level tokenizer, word by word: the library's ids, several times faster.

GPT-2's family first cuts a text into words with one regular expression and then encodes every word
by itself, so the ids of a word never depend on what surrounds it, and a text has few different
words. Here the cutting is done by Python's `re` and each word is encoded by the library, once.

What `re` and the library might cut differently is left to the library:

- Whether a character beyond ASCII is a letter, a number or a symbol depends on a Unicode version. A
  stretch without white space is therefore handed over whole from the word that touches the first
  such character on. White space ends every word but its own kind, so that such a cut is safe.
- A text with white space beyond ASCII, or that normalisation would change, is handed over whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_BEYOND = r"[^\x00-\x7f]"
# The pattern of the library's ByteLevel pre-tokenizer, for ASCII. Quantifiers are possessive (++)
# where a shorter word followed by ASCII would otherwise be found inside one that touches _BEYOND.
_WORDS = (
    rf"'(?:s|t|re|ve|m|ll|d)(?:(?!{_BEYOND})|\S+)"
    rf"| ?[A-Za-z]++(?!{_BEYOND})"
    rf"| ?[0-9]++(?!{_BEYOND})"
    rf"| ?[^\sA-Za-z0-9\x80-\U0010ffff]++(?!{_BEYOND})"
    r"| ?\S+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# All that any version of Unicode calls white space beyond ASCII, and what looks like it.
_SPACES = re.compile(
    "[\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff]"
)
_LINE_END = re.compile(r"[!-~]\n")

# Of a text, so that a very long one takes little memory: its words are a Python list for a while.
_PIECE = 1 << 18
# Some 20 MB. A corpus whose words go on changing fills it again and again.
_REMEMBERED = 100_000
_LONGEST_REMEMBERED = 64


class Words:
    """The ids of texts, equal to those of `tokenizer`, for which `cuts_words` must be true."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = _Known(tokenizer)
        self._find = re.compile(_WORDS, re.ASCII).findall
        added = tokenizer.get_added_tokens_decoder().values()
        # As the library does: first those that are looked for in the text as it stands, then those
        # that are looked for in the normalised text; the longest where several begin.
        self._splits = [
            re.compile("|".join(re.escape(content) for content in contents))
            for normalized in (False, True)
            if (
                contents := sorted(
                    (token.content for token in added if token.normalized == normalized),
                    key=len,
                    reverse=True,
                )
            )
        ]

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text):
            if self._is_plain(piece):
                ids += chain.from_iterable(map(self._known.__getitem__, self._cut(piece)))
            else:
                ids += self._tokenizer.encode_batch_fast([piece])[0].ids
        return ids

    def _is_plain(self, text: str) -> bool:
        if text.isascii():
            return True
        # Scripts beyond ASCII come in long stretches of which few are ever seen again.
        foreign = len(text.encode("utf-8")) > 1.25 * len(text)
        return not (foreign or _SPACES.search(text) or not unicodedata.is_normalized("NFC", text))

    def _cut(self, text: str) -> Iterator[str] | list[str]:
        for split in self._splits:
            if split.search(text):
                return self._cut_around_added(text)
        return self._find(text)

    def _cut_around_added(self, text: str) -> Iterator[str]:
        """Added tokens are words; what lies between two of them is a text of its own."""
        parts = [(text, False)]
        for split in self._splits:
            parts = [part for whole in parts for part in _split(split, *whole)]
        for part, is_added in parts:
            if is_added:
                yield part
            else:
                yield from self._find(part)


def cuts_words(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer works as this module takes for granted.

    Its words are those of GPT-2, it is deterministic, adds nothing at either end of a text, and its
    added tokens are found wherever they stand and swallow no white space around them.
    """
    from tokenizers.models import BPE

    normalizer, pre_tokenizer, post_processor = (
        json.loads(part.__getstate__()) if part else {"type": None}
        for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)
    )
    return (
        normalizer["type"] in (None, "NFC")
        and pre_tokenizer["type"] == "ByteLevel"
        and not pre_tokenizer["add_prefix_space"]
        and pre_tokenizer.get("use_regex", True)
        and post_processor["type"] in (None, "ByteLevel")
        and isinstance(tokenizer.model, BPE)
        and not tokenizer.model.dropout
        and not any(
            token.lstrip or token.rstrip or token.single_word or "\n" in token.content
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def pieces(text: str) -> Iterator[str]:
    """A long text cut before line ends, each of which begins a word whatever stands before it."""
    start = 0
    while len(text) - start > _PIECE and (found := _LINE_END.search(text, start + _PIECE)):
        yield text[start : found.start() + 1]
        start = found.start() + 1
    yield text[start:] if start else text


def _split(pattern: re.Pattern[str], text: str, is_added: bool) -> Iterator[tuple[str, bool]]:
    """(part, whether it is a match) in order; a match stays whole."""
    if is_added:
        yield text, True
        return
    start = 0
    for match in pattern.finditer(text):
        if match.start() > start:
            yield text[start : match.start()], False
        yield match[0], True
        start = match.end()
    if start < len(text):
        yield text[start:], False


class _Known(dict[str, tuple[int, ...]]):
    """Ids by word; a word that is looked up for the first time is encoded."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode_batch_fast([word])[0].ids)
        if len(word) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = ids
        return ids
