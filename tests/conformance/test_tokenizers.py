"""The published tokenizers, on real text: every way to load one, and every way to encode."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import tokenizers

from neox.tokenizer import load_tokenizer
from neox.tokenizer.words import cuts_words

OPENAI = "https://openaipublic.blob.core.windows.net"


def real_texts(shared: Path) -> list[str]:
    files = ("upstream/data/input.jsonl", "data/lambada/lambada_test.jsonl")
    lines = [line for file in files for line in (shared / file).read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    "path",
    ["data/20B_tokenizer.json", "data/gpt2_tokenizer.json", "upstream/tok/small_tokenizer.json"],
)
def test_many_texts_get_the_ids_of_one_by_one(shared: Path, path: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(shared / path))
    assert cuts_words(library)
    texts = real_texts(shared)[::3]
    texts += ["\n".join(texts[:200]), "  indented\n    more    \n", " ".join(texts[100:300])]
    ours = load_tokenizer("HFTokenizer", str(shared / path)).tokenize_batch(texts)
    assert ours == [encoding.ids for encoding in library.encode_batch_fast(texts)]


@pytest.mark.parametrize("name", ["gpt2", "r50k_base"])
def test_tiktoken_from_its_own_files(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The library compares the checksums of its files, so these are the published ones."""
    import tiktoken.registry

    model = json.loads((shared / "data/gpt2_tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [chr(b) for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    others = [chr(256 + n) for n in range(256 - len(printable))]
    assert set(printable + others) == set(letters)
    hidden = [b for b in range(256) if chr(b) not in printable]
    byte_of = {c: ord(c) for c in printable} | dict(zip(others, hidden, strict=True))
    ranks = [
        (rank, base64.b64encode(bytes(byte_of[c] for c in token)).decode())
        for token, rank in model["vocab"].items()
        if token != "<|endoftext|>"
    ]
    files = {
        f"{OPENAI}/gpt-2/encodings/main/vocab.bpe": "\n".join(["#version: 0.2", *merges]) + "\n",
        f"{OPENAI}/gpt-2/encodings/main/encoder.json": json.dumps(model["vocab"]),
        f"{OPENAI}/encodings/r50k_base.tiktoken": "".join(
            f"{token} {rank}\n" for rank, token in sorted(ranks)
        ),
    }
    for url, contents in files.items():
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_text(contents)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tokenizer = load_tokenizer("TiktokenTokenizer", name)
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    same = load_tokenizer("HFTokenizer", str(shared / "data/gpt2_tokenizer.json"))
    for text in [*real_texts(shared)[::10], "one<|endoftext|>two"]:
        assert tokenizer.tokenize(text) == same.tokenize(text)
