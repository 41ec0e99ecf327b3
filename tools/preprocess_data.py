"""Tokenize text corpora into the .bin and .idx files that training reads.

    python tools/preprocess_data.py --input a.jsonl,b.jsonl.zst --output-prefix data/mine \\
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod --workers 8

writes data/mine_text_document.bin and .idx; the configuration then says
data_path: data/mine_text_document.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.data.preprocess import Options, preprocess
from neox.errors import NeoXError
from neox.tokenizer import TYPES, load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        required=True,
        help="files or folders, with commas between: .jsonl, .jsonl.gz, .jsonl.zst, .txt",
    )
    group.add_argument(
        "--jsonl-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the JSON objects, each made into a dataset of its own (default: text)",
    )
    group.add_argument("--num-docs", type=int, help="number of documents, for the progress bar")
    group.add_argument("--ftfy", action="store_true", help="repair broken encodings with ftfy")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TYPES)
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file", help="of a GPT2BPETokenizer")
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
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
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # A cancelled job leaves neither processes nor half a file behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many processes
    tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file)
    done = preprocess(
        arguments.input.split(","),
        arguments.output_prefix,
        tokenizer,
        Options(arguments.jsonl_keys, arguments.append_eod, arguments.ftfy),
        workers=arguments.workers,
        num_docs=arguments.num_docs,
        log_interval=arguments.log_interval,
    )
    log.info(
        f"{done.documents} documents, {done.tokens} tokens in {done.seconds:.1f} s "
        f"({done.documents / done.seconds:.0f} documents/s)"
    )
    for key in arguments.jsonl_keys:
        log.info(f"wrote {arguments.output_prefix}_{key}_document.bin and .idx")


if __name__ == "__main__":
    try:
        main()
    except NeoXError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
