"""`finetune_data` in a run: its files, the run's tokenizer and chat template together."""

from __future__ import annotations

from neox.config import NeoXConfig
from neox.data.examples import ExampleEncoder
from neox.data.finetune import settle_examples
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer, tokenizer_digest
from neox.tokenizer.chat import ChatTemplate, find_chat_template, template_digest


def tokenize_examples(
    config: NeoXConfig, groups: ProcessGroups, tokenizer: Tokenizer
) -> NeoXConfig:
    """With datasets in the place of `finetune_data`, if it is given. Collective over the world.

    DataError for files that cannot be used, ConfigError for conversations without a template.
    """
    if not config.finetune_data:
        return config

    def template(where: str) -> ChatTemplate:
        return find_chat_template(config, f"finetune_data has a conversation ({where})")

    identity = [tokenizer_digest(config), template_digest(config)]
    return settle_examples(config, groups, ExampleEncoder(tokenizer, template), identity)
