#!/usr/bin/env python3
"""Tokenize documents that begin with a prompt, and labels in which the prompt is not learnt.

    python tools/preprocess_data_with_mask.py --input questions.jsonl --output-prefix data/mine \\
        --tokenizer-type HFTokenizer --vocab-file 20B_tokenizer.json --append-eod \\
        --mask-before-token 32869,27

writes data/mine_text_document and data/mine_label_document, .bin and .idx of each. The ids after
--mask-before-token are those of the text that ends a prompt, here "Answer:". Labels are masked up
to the end of the first place where they stand; a document without them is learnt as a whole.
The configuration then says train_data_paths and train_label_data_paths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.data.recipes import Recipe, TextRecipe
from neox.errors import DataError
from neox.tokenizer import load_tokenizer
from tools.preprocess_data import add_input, add_output, add_tokenizer, make, new_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_input(parser, key="text")
    add_tokenizer(parser)
    parser.add_argument(
        "--mask-before-token",
        type=ids,
        required=True,
        metavar="ID[,ID...]",
        help="token ids with commas between; labels up to and including them are masked",
    )
    add_output(parser)
    options = parser.parse_args(arguments)

    def recipe() -> Recipe:
        tokenizer = load_tokenizer(options.tokenizer_type, options.vocab_file, options.merge_file)
        beyond = [i for i in options.mask_before_token if i >= tokenizer.vocab_size]
        if beyond:
            raise DataError(
                f"--mask-before-token {beyond[0]} is no token: the tokenizer's ids go from 0 to "
                f"{tokenizer.vocab_size - 1}"
            )
        return TextRecipe(
            tokenizer,
            options.jsonl_keys,
            options.append_eod,
            options.ftfy,
            options.mask_before_token,
        )

    make(options, recipe)


def ids(text: str) -> list[int]:
    words = text.strip("[] ").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 32869,27")
    return [int(word) for word in words]


if __name__ == "__main__":
    main()
