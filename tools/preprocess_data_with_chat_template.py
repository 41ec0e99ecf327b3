#!/usr/bin/env python3
"""Tokenize conversations with a chat template, and labels in which only the model's turns count.

    python tools/preprocess_data_with_chat_template.py --input chats.jsonl \\
        --output-prefix data/mine --tokenizer-path folder_of_a_chat_model

Each line has {"conversation": [{"role": "user", "content": "..."}, ...]}. This writes
data/mine_conversation_document and data/mine_conversation_label_document, .bin and .idx of each.
The configuration then says train_data_paths and train_label_data_paths.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.data.recipes import ChatRecipe, Recipe
from tools.preprocess_data import add_input, add_output, make, new_parser

NO_REWARDS = "training on rewards (reward models, KTO, DPO) is not done here, so nothing would read"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_input(parser, key="conversation")
    group = parser.add_argument_group("conversations")
    group.add_argument(
        "--tokenizer-path", required=True, help="folder of a transformers tokenizer with a template"
    )
    group.add_argument(
        "--generation-role", default="assistant", help="whose turns are learnt (default: assistant)"
    )
    group.add_argument(
        "--only-last", action="store_true", help="learn the turn that ends a conversation only"
    )
    group.add_argument(
        "--no-mask", action="store_true", help="learn everything: write no labels, add no token"
    )
    group.add_argument("--for-rm", action="store_true", help="refused: rewards are not trained on")
    group.add_argument("--reward-key", metavar="KEY", help="refused likewise")
    group.add_argument("--binary-reward", action="store_true", help="refused likewise")
    add_output(parser)
    options = parser.parse_args(arguments)
    for flag in ("for_rm", "reward_key", "binary_reward"):
        if getattr(options, flag):
            parser.error(f"--{flag.replace('_', '-')}: {NO_REWARDS} what it writes")
    if options.no_mask and options.only_last:
        parser.error("--only-last says what is masked, and --no-mask that nothing is")

    def recipe() -> Recipe:
        log.quiet_third_parties()
        from neox.tokenizer.chat import load_chat_template

        return ChatRecipe(
            load_chat_template(options.tokenizer_path),
            options.jsonl_keys,
            options.generation_role,
            options.only_last,
            not options.no_mask,
            options.ftfy,
        )

    make(options, recipe)


if __name__ == "__main__":
    main()
