"""The chat template that `apply_chat_template` puts prompts into."""

from __future__ import annotations

from neox.config import NeoXConfig
from neox.tokenizer.chat import ChatTemplate, find_chat_template


def chat_template_of(config: NeoXConfig) -> ChatTemplate | None:
    """None without `apply_chat_template`. ConfigError when there is no template."""
    if not config.apply_chat_template:
        return None
    return find_chat_template(config, "apply_chat_template is true")
