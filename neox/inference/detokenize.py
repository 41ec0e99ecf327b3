"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from neox.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_CONTEXT = 8  # tokens of what came before: a character has 4 at most


class StreamingDetokenizer:
    """Turns a stream of tokens into pieces of text that add up to the text of them all.

    A byte-level token may end inside a character; its piece is then held back until the rest has
    come. Only the tokens since the last two complete pieces are decoded again, so a long text does
    not get slower; the older of the two pieces is context, because some tokenizers write a token
    differently at the start of a text. So is the end of what the tokens follow, `before`, say a
    prompt: its text and the pieces add up to the text of both. Only where it ends inside a
    character the tokens stand alone.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(before[-_CONTEXT:])
        if tokenizer.detokenize(self._context).endswith(REPLACEMENT):
            self._context = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The rest, with U+FFFD where a character was never completed."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.detokenize(self._context)
        return self._tokenizer.detokenize(self._context + self._pending)[len(before) :]
