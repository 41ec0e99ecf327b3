from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neox.config import from_dict
from neox.errors import DataError
from neox.tokenizer import build_tokenizer, load_tokenizer
from tests import small_tokenizer

TEXTS = [
    "",
    "plain words",
    " leading and  double  spaces, tabs\tand\r\nline ends \n\n",
    "punctuation ,  is . not ! cleaned n't up",
    "naïve café, 東京, 🙂👩‍👩‍👧, \u0000 control \x07",
    "e\u0281 is not composed",
]


@pytest.fixture
def vocab_and_merges(tmp_path: Path) -> tuple[str, str]:
    model = small_tokenizer.train(special=["<|endoftext|>"]).model
    vocab, merges = model.save(str(tmp_path))
    return vocab, merges


def test_hf_round_trip_is_exact(tmp_path: Path) -> None:
    path = small_tokenizer.write(tmp_path)
    tokenizer = load_tokenizer("HFTokenizer", str(path))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (280, 0, 1)
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert max(ids, default=0) < 280
        assert tokenizer.detokenize(ids) == text


def test_ids_equal_the_librarys_own(tmp_path: Path) -> None:
    path = small_tokenizer.write(tmp_path)
    tokenizer, library = load_tokenizer("HFTokenizer", str(path)), small_tokenizer.train()
    for text in [*TEXTS, "a<|endoftext|>b"]:
        assert tokenizer.tokenize(text) == library.encode(text).ids


def test_special_tokens_are_one_id_and_leave_no_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    ids = tokenizer.tokenize("one<|endoftext|>two<|padding|>")
    assert ids.count(0) == 1
    assert ids[-1] == 1
    assert tokenizer.detokenize(ids) == "onetwo"


def test_a_file_that_asks_for_truncation_does_not_get_it(tmp_path: Path) -> None:
    tokenizer = small_tokenizer.train()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer("HFTokenizer", str(tmp_path / "t.json"))
    assert loaded.detokenize(loaded.tokenize(small_tokenizer.TEXT)) == small_tokenizer.TEXT
    assert len(loaded.tokenize("a")) == 1


def test_incomplete_utf8_becomes_replacement_characters(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(small_tokenizer.write(tmp_path)))
    ids = tokenizer.tokenize("東")
    assert tokenizer.detokenize(ids[:-1]).endswith("\ufffd")


def test_gpt2_bpe_equals_the_single_file_form(vocab_and_merges: tuple[str, str]) -> None:
    tokenizer = load_tokenizer("GPT2BPETokenizer", *vocab_and_merges)
    library = small_tokenizer.train(special=["<|endoftext|>"])
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (280, 0, None)
    for text in [*TEXTS, "a<|endoftext|>b"]:
        ids = tokenizer.tokenize(text)
        assert ids == library.encode(text).ids
        assert tokenizer.detokenize(ids) == text.replace("<|endoftext|>", "")


def test_hf_gpt2_adds_a_padding_token(vocab_and_merges: tuple[str, str], tmp_path: Path) -> None:
    from_folder = load_tokenizer("HFGPT2Tokenizer", str(tmp_path))
    assert (from_folder.vocab_size, from_folder.eod, from_folder.pad) == (281, 0, 280)
    small_tokenizer.train().save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer("HFGPT2Tokenizer", str(tmp_path))
    assert (from_json.vocab_size, from_json.pad) == (280, 1)  # it has one already
    assert from_json.detokenize(from_json.tokenize(TEXTS[2])) == TEXTS[2]


def test_hf_gpt2_without_a_file_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise OSError("offline")

    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", no_network)
    with pytest.raises(DataError, match="set vocab_file to a folder"):
        load_tokenizer("HFGPT2Tokenizer")


def test_char_level() -> None:
    tokenizer = load_tokenizer("CharLevelTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (512, 0, 1)
    assert tokenizer.tokenize("aé\n") == [97, 195, 169, 10]
    assert tokenizer.detokenize([97, 195, 169, 10, 0, 1, 511]) == "aé\n"
    assert tokenizer.detokenize([195]) == "\ufffd"


@pytest.mark.parametrize("with_eod", [True, False])
def test_sentencepiece(tmp_path: Path, with_eod: bool) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text(small_tokenizer.TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=28,
        user_defined_symbols=["<|endoftext|>"] if with_eod else [],
        minloglevel=2,
    )
    tokenizer = load_tokenizer("SPMTokenizer", str(tmp_path / "spm.model"))
    assert tokenizer.vocab_size == 28
    assert tokenizer.eod == (3 if with_eod else 2)  # after <unk>, <s>, </s>; else </s>
    text = "the age of foolishness"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r".",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("TiktokenTokenizer", "gpt2")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (257, 256, None)
    ids = tokenizer.tokenize("aé<|endoftext|>")
    assert ids == [97, 195, 169, 256]
    assert tokenizer.detokenize(ids) == "aé"


def test_build_tokenizer_reads_the_configuration(tmp_path: Path) -> None:
    path = small_tokenizer.write(tmp_path)
    config = from_dict(
        {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "seq_length": 4,
            "max_position_embeddings": 4,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": str(path),
        }
    )
    assert build_tokenizer(config).vocab_size == 280


@pytest.mark.parametrize(
    ("tokenizer_type", "vocab_file", "merge_file", "message"),
    [
        ("HFTokenizer", None, None, "HFTokenizer needs vocab_file"),
        ("HFTokenizer", "absent.json", None, "absent.json does not exist"),
        ("HFTokenizer", "garbage", None, "not a tokenizer file"),
        ("HFTokenizer", "vocab.json", None, "use tokenizer_type: GPT2BPETokenizer"),
        ("HFTokenizer", "no_eod.json", None, "no <|endoftext|> token"),
        ("GPT2BPETokenizer", "vocab.json", None, "GPT2BPETokenizer needs merge_file"),
        ("GPT2BPETokenizer", "vocab.json", "garbage", "not a BPE vocabulary"),
        ("HFGPT2Tokenizer", "empty", None, "not a BPE vocabulary"),
        ("SPMTokenizer", "garbage", None, "not a SentencePiece model"),
        ("TiktokenTokenizer", "garbage", None, "takes the name of an encoding"),
    ],
)
def test_unusable_files_are_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer_type: str,
    vocab_file: str | None,
    merge_file: str | None,
    message: str,
) -> None:
    (tmp_path / "garbage").write_bytes(b"\x00\xff\xfe garbage")
    (tmp_path / "empty").mkdir()
    small_tokenizer.train(special=["<|endoftext|>"]).model.save(str(tmp_path))
    small_tokenizer.train(special=[]).save(str(tmp_path / "no_eod.json"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tokenizer_type, vocab_file, merge_file)
    assert message in str(caught.value)


def test_loading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from neox.tokenizer import load_tokenizer; "
        "load_tokenizer('CharLevelTokenizer'); "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
