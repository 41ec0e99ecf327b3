"""Every tokenizer type against the real library behind it, as upstream calls it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from neox.errors import DataError
from neox.tokenizer import TYPES, load_tokenizer
from tests import small_tokenizer

TEXTS = [
    "",
    "It was the best of times",
    " leading,  double  spaces\tand\r\nline ends \n\n",
    "we'll see, it's 'quoted' 1234567 times!",
    "naïve café, 東京, 🙂 \u0000",
    "one<|endoftext|>two",
    "x" * 300,
]
PLUGIN = """
def small():
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"th": 256, b"the": 257, b" the": 258, b"be": 259}
    return {
        "name": "small",
        "pat_str": r" ?\\p{L}+|[^\\p{L}]",
        "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": 260},
    }

def no_end():
    return {**small(), "name": "no_end", "special_tokens": {}}

ENCODING_CONSTRUCTORS = {"small": small, "no_end": no_end}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoding of tiktoken's own kind, found the way it finds those that users add."""
    import tiktoken.registry
    import tiktoken_ext

    folder = tmp_path / "tiktoken_ext"
    folder.mkdir()
    (folder / "small_encoding.py").write_text(PLUGIN)
    monkeypatch.setattr(tiktoken_ext, "__path__", [*tiktoken_ext.__path__, str(folder)])
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    monkeypatch.setitem(sys.modules, "tiktoken_ext.small_encoding", None)
    del sys.modules["tiktoken_ext.small_encoding"]
    tiktoken.registry._available_plugin_modules.cache_clear()
    yield tmp_path
    tiktoken.registry._available_plugin_modules.cache_clear()


@pytest.fixture
def files(tmp_path: Path, plugin: Path) -> dict[str, tuple[str | None, str | None]]:
    """vocab_file and merge_file of each type."""
    import sentencepiece

    vocab, merges = small_tokenizer.train(["<|endoftext|>"]).model.save(str(tmp_path))
    (tmp_path / "corpus.txt").write_text(small_tokenizer.TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=285,
        user_defined_symbols=["<|endoftext|>"],
        byte_fallback=True,
        minloglevel=2,
    )
    return {
        "GPT2BPETokenizer": (vocab, merges),
        "HFTokenizer": (str(small_tokenizer.write(tmp_path)), None),
        "HFGPT2Tokenizer": (str(tmp_path), None),
        "SPMTokenizer": (str(tmp_path / "spm.model"), None),
        "CharLevelTokenizer": (None, None),
        "TiktokenTokenizer": ("small", None),
    }


def upstreams(name: str, vocab_file: str, merge_file: str):
    """(text to ids, number of ids, eod) of the library object that upstream builds."""
    if name == "GPT2BPETokenizer":
        from transformers import GPT2Tokenizer

        tokenizer = GPT2Tokenizer(vocab=vocab_file, merges=merge_file, errors="replace")
        return tokenizer.encode, tokenizer.vocab_size, tokenizer.eos_token_id
    if name == "HFTokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(vocab_file)
        eod = tokenizer.token_to_id("<|endoftext|>")
        return (lambda text: tokenizer.encode(text).ids), tokenizer.get_vocab_size(), eod
    if name == "HFGPT2Tokenizer":
        from transformers import GPT2TokenizerFast

        tokenizer = GPT2TokenizerFast.from_pretrained(vocab_file)
        tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
        return tokenizer.encode, len(tokenizer), tokenizer.eos_token_id
    if name == "SPMTokenizer":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        eod = processor.piece_to_id("<|endoftext|>")
        return processor.encode, processor.get_piece_size(), eod
    if name == "CharLevelTokenizer":
        import numpy as np

        return (lambda text: list(np.frombuffer(text.encode(), dtype=np.uint8))), 512, 0
    import tiktoken

    encoding = tiktoken.get_encoding(vocab_file)
    encode = encoding.encode_batch
    return (
        (lambda text: encode([text], allowed_special="all")[0]),
        encoding.n_vocab,
        encoding.eot_token,
    )


@pytest.mark.parametrize("name", TYPES)
def test_ids_are_those_of_the_library_as_upstream_calls_it(name: str, files: dict) -> None:
    tokenizer = load_tokenizer(name, *files[name])
    encode, size, eod = upstreams(name, *files[name])
    assert (tokenizer.vocab_size, tokenizer.eod) == (size, eod)
    expected = [encode(text) for text in TEXTS]
    assert [tokenizer.tokenize(text) for text in TEXTS] == expected
    assert tokenizer.tokenize_batch(TEXTS) == expected
    if name != "CharLevelTokenizer":
        assert tokenizer.tokenize("one<|endoftext|>two").count(eod) == 1
    for text, ids in zip(TEXTS, expected, strict=True):
        if name != "SPMTokenizer":  # whose models normalise
            said = text.replace("<|endoftext|>", "") if name != "CharLevelTokenizer" else text
            assert tokenizer.detokenize(ids) == said.replace("\0", "" if name[0] == "C" else "\0")


@pytest.mark.parametrize("name", TYPES)
def test_every_tokenizer_travels_to_another_process(name: str, files: dict) -> None:
    tokenizer = load_tokenizer(name, *files[name])
    expected = tokenizer.tokenize_batch(TEXTS)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize_batch(TEXTS) == expected
    assert (copy.name, copy.vocab_size, copy.eod, copy.pad) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eod,
        tokenizer.pad,
    )


@pytest.mark.parametrize("name", ["SPMTokenizer", "TiktokenTokenizer"])
def test_workers_tokenize_alike(name: str, files: dict, tmp_path: Path) -> None:
    """Through the command: its processes start anew, and find tiktoken's plugins by PYTHONPATH."""
    (tmp_path / "in.jsonl").write_text('{"text": "the best of the times"}\n' * 3)
    command = [sys.executable, "tools/preprocess_data.py", "--tokenizer-type", name, "--append-eod"]
    command += ["--vocab-file", files[name][0], "--input", tmp_path / "in.jsonl"]
    written = set()
    for workers in ("1", "2"):
        done = subprocess.run(
            [*command, "--workers", workers, "--output-prefix", tmp_path / workers],
            cwd=Path(__file__).parents[2],
            env={"PYTHONPATH": str(tmp_path), "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        written.add((tmp_path / f"{workers}_text_document.bin").read_bytes())
    assert len(written) == 1


def test_tiktoken_without_an_end_of_document(plugin: Path) -> None:
    with pytest.raises(DataError, match=r"no_end has no <\|endoftext\|>"):
        load_tokenizer("TiktokenTokenizer", "no_end")


def test_tiktoken_offline_names_the_file_to_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name is the SHA-1 of the address that the error gives."""
    import requests

    def get(url: str) -> None:
        raise requests.ConnectionError("offline", request=requests.Request("GET", url))

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_tokenizer("TiktokenTokenizer", "cl100k_base")
    name = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    assert f"put the file of that address at {tmp_path / name}" in str(caught.value)


def test_a_name_of_the_hub_is_fetched_and_a_path_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_pretrained(name: str):
        asked.append(name)
        return small_tokenizer.train()

    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", from_pretrained)
    for name in (None, "gpt2", "openai-community/gpt2-large"):
        assert load_tokenizer("HFGPT2Tokenizer", name).eod == 0
    assert asked == ["gpt2", "gpt2", "openai-community/gpt2-large"]
    for path in ("/absent/folder", "./absent", "a/b/absent"):
        with pytest.raises(DataError, match="does not exist"):
            load_tokenizer("HFGPT2Tokenizer", path)
    assert len(asked) == 3
