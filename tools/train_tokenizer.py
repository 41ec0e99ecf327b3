#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer on text and write it as a `tokenizers` .json file.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 512 --output tokenizer.json

Use it with `tokenizer_type: HFTokenizer` and `vocab_file: tokenizer.json`. Any text can be encoded
and comes back exactly: all 256 bytes are tokens, and nothing is normalised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from neox import log
from neox.atomic import write_text
from neox.data.corpus import find_files, read_chunks
from neox.errors import NeoXError
from neox.tokenizer.tokenizer import END_OF_DOCUMENT, PADDING

SMALLEST = 256 + 2  # every byte, and the two special tokens


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_FOLDER")
    parser.add_argument("--jsonl-key", default="text", help="of each line; default: %(default)s")
    parser.add_argument("--vocab-size", type=int, required=True, help=f"at least {SMALLEST}")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    options = parser.parse_args(arguments)
    if options.vocab_size < SMALLEST:
        parser.error(f"--vocab-size {options.vocab_size} is below {SMALLEST}, the bytes alone")
    try:
        tokenizer = train(texts(options.input, options.jsonl_key), options.vocab_size)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, tokenizer.to_str(pretty=True))
    except (NeoXError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens")
    return 0


def train(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """The end of a document is token 0, padding 1, the 256 bytes follow, then the merges.

    A small corpus may have fewer merges to give than `vocab_size` has room for.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def texts(inputs: Sequence[str], key: str) -> Iterator[str]:
    """The text of every document, file by file. DataError where a file or a line is not good."""
    files = find_files(inputs)
    size = sum(file.stat().st_size for file in files)
    with log.progress(total=size, desc="reading", unit="B") as bar:
        for chunk in read_chunks(files):
            for record in chunk.records():
                yield from record.texts([key])
            bar.update(chunk.bytes_read - bar.n)


if __name__ == "__main__":
    sys.exit(main())
