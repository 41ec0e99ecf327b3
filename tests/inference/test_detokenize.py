"""Text as it comes: whole characters only, and in the end the whole text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from neox.inference.detokenize import StreamingDetokenizer
from tests.inference.fakes import ByteTokenizer


def pieces(tokenizer, tokens: Sequence[int]) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語とか", "👩‍🚀, 🇩🇪", "a\ufffdb", ""])
def test_characters_come_whole(text):
    tokenizer = ByteTokenizer()
    got = pieces(tokenizer, tokenizer.tokenize(text))
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in got)


def test_each_character_comes_with_its_last_byte():
    assert pieces(ByteTokenizer(), "aé🎈".encode()) == ["a", "", "é", "", "", "", "🎈", ""]


def test_a_character_cut_off_is_shown_at_the_end():
    got = pieces(ByteTokenizer(), "ab🎈".encode()[:-1])
    assert got[:2] == ["a", "b"]
    assert "".join(got) == "ab\ufffd"


def test_bytes_that_never_become_a_character_do_not_block_what_follows():
    assert pieces(ByteTokenizer(), [0x80, 0xE2, ord("a"), ord("b")]) == [
        "", "", "\ufffd\ufffda", "b", "",
    ]  # fmt: skip


class WordTokenizer:
    """As SentencePiece: the space before a word belongs to it, but not at the start of a text."""

    words = ("", " one", " two", "s")

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize("tokens", [[1, 2, 3, 1], [0, 1, 0, 0, 2, 3], [3, 1, 0]])
def test_spaces_between_words_survive(tokens):
    assert "".join(pieces(WordTokenizer(), tokens)) == WordTokenizer().detokenize(tokens)


@pytest.mark.parametrize("before", [[1], [1, 2, 3] * 5, [3, 0, 0], [0]])
@pytest.mark.parametrize("tokens", [[1, 2, 3, 1], [0, 2], [3]])
def test_a_text_joins_what_it_follows(before, tokens):
    tokenizer = WordTokenizer()
    detokenizer = StreamingDetokenizer(tokenizer, before)
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    assert tokenizer.detokenize(before) + text == tokenizer.detokenize([*before, *tokens])


def test_behind_half_a_character_tokens_stand_alone():
    detokenizer = StreamingDetokenizer(ByteTokenizer(), "a🎈".encode()[:-1])
    assert [detokenizer.push(token) for token in "🎈b".encode()[-2:]] == ["", "\ufffdb"]
