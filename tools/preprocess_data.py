#!/usr/bin/env python3
"""Tokenize text corpora into the .bin and .idx files that training reads.

    python tools/preprocess_data.py --input a.jsonl,b.jsonl.zst --output-prefix data/mine \\
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod --workers 8

writes data/mine_text_document.bin and .idx; the configuration then says
data_path: data/mine_text_document. docs/preprocessing.md has more.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.data.preprocess import preprocess
from neox.data.recipes import Recipe, TextRecipe
from neox.errors import NeoXError
from neox.tokenizer import TYPES, load_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_input(parser, key="text")
    add_tokenizer(parser)
    add_output(parser)
    options = parser.parse_args(arguments)

    def recipe() -> Recipe:
        tokenizer = load_tokenizer(options.tokenizer_type, options.vocab_file, options.merge_file)
        return TextRecipe(tokenizer, options.jsonl_keys, options.append_eod, options.ftfy)

    make(options, recipe)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_input(parser: argparse.ArgumentParser, key: str) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        required=True,
        help="files or folders, with commas between: .jsonl, .json, .txt, .tar, .zip; .gz, .zst, "
        ".xz or .bz2 behind it",
    )
    group.add_argument(
        "--jsonl-keys",
        nargs="+",
        default=[key],
        metavar="KEY",
        help=f"keys of the JSON objects, each made into a dataset of its own (default: {key})",
    )
    group.add_argument("--num-docs", type=int, help="number of documents, for the progress bar")
    group.add_argument("--ftfy", action="store_true", help="repair broken encodings with ftfy")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TYPES)
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file", help="of a GPT2BPETokenizer")
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path without _KEY_document.bin")
    group.add_argument(
        "--dataset-impl", choices=["mmap"], default="mmap", help="the one format there is"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    group.add_argument(
        "--log-interval", type=int, default=100, help="documents between updates (default: 100)"
    )


def make(options: argparse.Namespace, recipe: Callable[[], Recipe]) -> None:
    """Write the recipe's datasets, and say so. Exits with 2 where the input is at fault."""
    # A cancelled job leaves neither processes nor half a file behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many processes
    try:
        chosen = recipe()
        done = preprocess(
            [name for name in options.input.split(",") if name],
            options.output_prefix,
            chosen,
            workers=options.workers,
            num_docs=options.num_docs,
            log_interval=options.log_interval,
        )
    except NeoXError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    log.info(
        f"{done.documents} documents, {done.tokens} tokens in {done.seconds:.1f} s "
        f"({done.documents / done.seconds:.0f} documents/s)"
    )
    if chosen.labels:
        share = done.masked / max(done.tokens, 1)
        log.info(f"{done.masked} labels are masked, {share:.1%}")
        if not done.masked:
            log.warning("nothing is masked: check the ids, or the role, whose turns are learnt")
    for name in chosen.names:
        log.info(f"wrote {options.output_prefix}_{name}_document.bin and .idx")


if __name__ == "__main__":
    main()
