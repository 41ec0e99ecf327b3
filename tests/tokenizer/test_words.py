"""The fast way through many texts gives the ids of the library, whatever the text."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from neox.tokenizer import load_tokenizer, words
from neox.tokenizer.words import Words, cuts_words, pieces
from tests import small_tokenizer

ASCII = [chr(i) for i in range(128)]
# Contractions, marks that combine with what stands before, letters, numbers and spaces beyond
# ASCII, characters that normalise to ASCII, added tokens, and the ends of words.
TRICKY = [
    *("'s", "'ll", "'re", " '", "''", "  ", "    ", "\n\n", " \n", "\t ", "\x1c"),
    *("é", "e\u0301", "\u0301", "—", "“", "²", "\u0660", "東", "🙂", "👩\u200d👧", "\U00011f00"),
    *("\xa0", "\x85", "\u2028", "\u3000", "\u200b", "\ufeff", "\u037e", "\u212a", "\u1fef"),
    *("<|endoftext|>", "<|pad", "ding|>", "<|padding|>"),
]
SIMPLE = ["a", "b", "S", " ", " ", "\n", "'", "s", "1", "9", "é", "\u0301", "—", ".", "\t"]


def neox_like() -> Tokenizer:
    """As GPT-NeoX-20B's: NFC, and runs of spaces as added tokens of the normalised text."""
    tokenizer = small_tokenizer.train()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    runs = [AddedToken(" " * n, normalized=True, special=False) for n in (4, 3, 2)]
    tokenizer.add_tokens(runs)
    return tokenizer


@pytest.fixture(params=["plain", "neox"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small_tokenizer.train() if request.param == "plain" else neox_like()


@pytest.mark.parametrize("alphabet", ["simple", "tricky", "ascii", "unicode"])
def test_ids_are_the_librarys(
    tokenizer: Tokenizer, alphabet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_PIECE", 150)
    monkeypatch.setattr(words, "_REMEMBERED", 50)
    fast, rng = Words(tokenizer), random.Random(alphabet)
    chosen = {"simple": SIMPLE, "tricky": TRICKY + SIMPLE, "ascii": ASCII, "unicode": SIMPLE}
    plain = 0
    for n in range(2500):
        part = [rng.choice(chosen[alphabet]) for _ in range(rng.randint(1, 12))]
        if alphabet == "unicode":
            part.insert(rng.randint(0, len(part)), chr(rng.randrange(0x80, 0xD800)))
            part.insert(rng.randint(0, len(part)), chr(rng.randrange(0xE000, 0x110000)))
        text = "".join(part)
        if n % 2:  # so long that it is no foreign script
            text = f"{'times of wisdom ' * 8}{text}{'best' * rng.randint(0, 2)}"
        plain += fast._is_plain(text)
        assert fast.tokenize(text) == tokenizer.encode(text).ids, ascii(text)
    assert plain > 400  # words were cut here, and not all handed over


def test_every_pair_of_ascii_characters() -> None:
    tokenizer = neox_like()
    fast = Words(tokenizer)
    for first in ASCII:
        for text in (f"a {first}{second}\u00e9 b{second}" for second in ASCII):
            text = "some words before it " + text
            assert fast.tokenize(text) == tokenizer.encode(text).ids, ascii(text)


def test_long_texts_are_cut_where_nothing_changes(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    lines = ["the age", "  of wisdom.", "", "é\n", "x \n", "a'", "'s", "    y", "東京"]
    text = "\n".join(rng.choice(lines) for _ in range(70_000))
    parts = list(pieces(text))
    assert len(parts) > 1 and "".join(parts) == text
    assert Words(tokenizer).tokenize(text) == tokenizer.encode(text).ids


def test_a_long_text_without_line_ends_stays_whole() -> None:
    text = "a" * 600_000
    assert list(pieces(text)) == [text]
    assert list(pieces("")) == [""]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED", 20)
    fast = Words(small_tokenizer.train())
    for n in range(500):
        fast.tokenize(f"word{n} " + "x" * 100)
        assert len(fast._known) <= 20
        assert max(map(len, fast._known)) <= 64


def others() -> dict[str, Tokenizer]:
    """Tokenizers that cut words otherwise, or give a word ids that depend on what is around it."""
    names = ("prefix", "lowercase", "split", "template", "dropout", "lstrip", "word", "none")
    found = {name: small_tokenizer.train() for name in names}
    found["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found["lowercase"].normalizer = normalizers.Lowercase()
    found["split"].pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found["template"].post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    found["dropout"].model.dropout = 0.5
    found["lstrip"].add_tokens([AddedToken("<x>", lstrip=True)])
    found["word"].add_tokens([AddedToken("best", single_word=True)])
    found["none"].pre_tokenizer = None
    return found


@pytest.mark.parametrize("name", list(others()))
def test_other_tokenizers_are_left_to_the_library(name: str) -> None:
    assert not cuts_words(others()[name])


def test_a_unigram_model_goes_through_the_library(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<|endoftext|>"],
        unk_token="<|endoftext|>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([small_tokenizer.TEXT] * 9, trainer)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer("HFTokenizer", str(tmp_path / "t.json"))
    texts = ["It was the worst", "", "of\n\n times"]
    assert loaded.tokenize_batch(texts) == [tokenizer.encode(text).ids for text in texts]


def test_it_is_used_and_survives_pickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    texts = ["It was", "", "the best<|endoftext|>of é times "]
    expected = [loaded.tokenize(text) for text in texts]
    assert loaded.tokenize_batch(texts) == expected
    assert pickle.loads(pickle.dumps(loaded)).tokenize_batch(texts) == expected
    monkeypatch.setattr(words.Words, "tokenize", lambda self, text: [9])
    assert loaded.tokenize_batch(texts) == [[9]] * 3
