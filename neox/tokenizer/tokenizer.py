"""One small interface over the tokenizer libraries; each library is imported only when used."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from neox.errors import DataError
from neox.tokenizer.words import Words, cuts_words

if TYPE_CHECKING:
    import tokenizers

    from neox.config import NeoXConfig

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")  # in a folder


class Tokenizer(Protocol):
    """What training, generation and evaluation ask of a tokenizer."""

    name: str  # the value of `tokenizer_type`
    vocab_size: int  # ids are 0 .. vocab_size - 1; the model's vocabulary may be padded beyond
    eod: int  # ends a document
    pad: int | None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`; the text of a special token becomes its one id."""
        ...

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, the same as `tokenize`'s; fast where there are very many."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, each below `vocab_size`.

        Special tokens leave no text; bytes that are not whole UTF-8 characters become U+FFFD.
        Otherwise byte-level tokenizers give back exactly what was tokenized.
        """
        ...


def build_tokenizer(config: NeoXConfig) -> Tokenizer:
    """The tokenizer of `tokenizer_type`, `vocab_file` and `merge_file`. DataError as below."""
    return load_tokenizer(config.tokenizer_type, config.vocab_file, config.merge_file)


def tokenizer_digest(config: NeoXConfig) -> str:
    """SHA-256 over the tokenizer's type and files; over the name of one that has no files here."""
    hasher = hashlib.sha256(f"{config.tokenizer_type}\n".encode())
    for value in (config.vocab_file, config.merge_file):
        path = Path(value or "")
        files = [path / name for name in _FILES] if path.is_dir() else [path]
        there = [file for file in files if value and file.is_file()]
        for file in there:
            hasher.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
        if not there:
            hasher.update(f"{value}\n".encode())
    return hasher.hexdigest()


def load_tokenizer(
    tokenizer_type: str, vocab_file: str | None = None, merge_file: str | None = None
) -> Tokenizer:
    """Load a tokenizer; DataError when a file is not given, missing, or not what the type needs."""
    return _LOADERS[tokenizer_type](vocab_file, merge_file)


class LibraryTokenizer:
    """A `tokenizers.Tokenizer`: any byte-level BPE and whatever else its JSON files describe."""

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, source: str) -> None:
        eod = tokenizer.token_to_id(END_OF_DOCUMENT)
        if eod is None:
            raise DataError(
                f"{source} has no {END_OF_DOCUMENT} token, which marks the end of a document; add "
                "it to the tokenizer as a special token, or use another tokenizer_type"
            )
        self.name = name
        self.eod: int = eod
        self.pad: int | None = tokenizer.token_to_id(PADDING)
        self.vocab_size: int = tokenizer.get_vocab_size()
        # Files can ask for both; a document must be neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @cached_property
    def _words(self) -> Words | None:
        return Words(self._tokenizer) if cuts_words(self._tokenizer) else None

    def tokenize(self, text: str) -> list[int]:
        # A batch of one: only the batch interface can leave out the character offsets, and that
        # makes it a fifth faster.
        return self._tokenizer.encode_batch_fast([text])[0].ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is not None:
            return [self._words.tokenize(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


class CharLevelTokenizer:
    """UTF-8 bytes as ids; 0 and 1 are end of document and padding, 256 to 511 have no text."""

    name = "CharLevelTokenizer"
    vocab_size = 512
    eod = 0
    pad: int | None = 1

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 1 < i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model. Without an <|endoftext|> piece its own end-of-sequence id is used."""

    name = "SPMTokenizer"

    def __init__(self, processor: Any, source: str) -> None:
        eod = processor.piece_to_id(END_OF_DOCUMENT)
        if processor.is_unknown(eod):
            eod = processor.eos_id()
        if eod < 0:
            raise DataError(f"{source} has neither an {END_OF_DOCUMENT} nor an end-of-sequence id")
        self.eod: int = eod
        self.pad: int | None = processor.pad_id() if processor.pad_id() >= 0 else None
        self.vocab_size: int = processor.get_piece_size()
        self._processor = processor

    def tokenize(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))


class TiktokenTokenizer:
    """An encoding of the tiktoken library."""

    name = "TiktokenTokenizer"

    def __init__(self, encoding: Any) -> None:
        self.eod: int = encoding.eot_token
        self.pad: int | None = None
        self.vocab_size: int = encoding.n_vocab
        self._special = {encoding.encode_single_token(s) for s in encoding.special_tokens_set}
        self._encoding = encoding

    def tokenize(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i for i in ids if i not in self._special])


def _load_hf(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    path = _existing("HFTokenizer", "vocab_file", vocab_file, "a tokenizer.json file")
    return LibraryTokenizer("HFTokenizer", _read_json(path), str(path))


def _load_gpt2_bpe(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    name = "GPT2BPETokenizer"
    vocab = _existing(name, "vocab_file", vocab_file, "GPT-2's vocab.json")
    merges = _existing(name, "merge_file", merge_file, "GPT-2's merges.txt")
    return LibraryTokenizer(name, _read_vocab_and_merges(vocab, merges), str(vocab))


def _load_hf_gpt2(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    """From a tokenizer folder, a tokenizer.json, or the Hugging Face hub by name (gpt2 if none).

    A padding token is added as upstream does, so the vocabulary is one larger than the files say.
    """
    name = "HFGPT2Tokenizer"
    source = vocab_file or "gpt2"
    if not Path(source).exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        tokenizer = _from_hub(source)
    else:
        path = _existing(name, "vocab_file", source, "a tokenizer folder or tokenizer.json")
        if path.is_file() or (path / "tokenizer.json").exists():
            tokenizer = _read_json(path if path.is_file() else path / "tokenizer.json")
        else:
            tokenizer = _read_vocab_and_merges(path / "vocab.json", path / "merges.txt")
    tokenizer.add_special_tokens([PADDING])
    return LibraryTokenizer(name, tokenizer, source)


def _read_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"vocab_file {path} is not a tokenizer file of the `tokenizers` library ({error}); for "
            "a vocabulary with a separate merges file use tokenizer_type: GPT2BPETokenizer"
        ) from None


def _read_vocab_and_merges(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise DataError(f"{vocab} and {merges} are not a BPE vocabulary ({error})") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_DOCUMENT) is not None:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])  # one id, even inside a text
    return tokenizer


def _from_hub(name: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:
        raise DataError(
            f"HFGPT2Tokenizer: there is no file or folder {name}, and the tokenizer of that name "
            f"could not be fetched from the hub ({error}) - set vocab_file to a folder with "
            "vocab.json and merges.txt, or to a tokenizer.json"
        ) from None


def _load_sentencepiece(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    path = _existing("SPMTokenizer", "vocab_file", vocab_file, "a SentencePiece .model file")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise DataError("SPMTokenizer needs a package: pip install sentencepiece") from None
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"vocab_file {path} is not a SentencePiece model ({error})") from None
    return SentencePieceTokenizer(processor, str(path))


def _load_tiktoken(vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise DataError("TiktokenTokenizer needs a package: pip install tiktoken") from None
    known = tiktoken.list_encoding_names()
    if vocab_file not in known:
        raise DataError(
            f"TiktokenTokenizer takes the name of an encoding as vocab_file, one of "
            f"{', '.join(known)}; it is {vocab_file!r}"
        )
    try:
        encoding = tiktoken.get_encoding(vocab_file)
    except (OSError, ValueError) as error:  # no network, and a file of other contents
        raise DataError(
            f"tiktoken could not fetch the encoding {vocab_file} ({error}); {_place(error)}"
        ) from None
    if END_OF_DOCUMENT not in encoding.special_tokens_set:
        raise DataError(f"the encoding {vocab_file} has no {END_OF_DOCUMENT}: choose another")
    return TiktokenTokenizer(encoding)


def _place(error: Exception) -> str:
    """Where tiktoken looks for the file that `error` is about: under the SHA-1 of its address."""
    url = getattr(getattr(error, "request", None), "url", None)
    if url is None:
        return "set TIKTOKEN_CACHE_DIR to a folder that holds it"
    name = hashlib.sha1(url.encode()).hexdigest()
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    advice = "" if folder else "set TIKTOKEN_CACHE_DIR to a folder and "
    return f"{advice}put the file of that address at {Path(folder or 'FOLDER') / name}"


def _existing(tokenizer_type: str, key: str, value: str | None, what: str) -> Path:
    if value is None:
        raise DataError(f"{tokenizer_type} needs {key}: the path of {what}")
    path = Path(value)
    if not path.exists():
        raise DataError(
            f"{key} {value} does not exist (looked in {path.parent.resolve()}); set it to the path "
            f"of {what}"
        )
    return path


_LOADERS: dict[str, Callable[[str | None, str | None], Tokenizer]] = {
    "GPT2BPETokenizer": _load_gpt2_bpe,
    "HFTokenizer": _load_hf,
    "HFGPT2Tokenizer": _load_hf_gpt2,
    "SPMTokenizer": _load_sentencepiece,
    "CharLevelTokenizer": lambda vocab_file, merge_file: CharLevelTokenizer(),
    "TiktokenTokenizer": _load_tiktoken,
}

TYPES = tuple(_LOADERS)
