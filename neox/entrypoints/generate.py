"""`./deepy.py generate.py`: text from a checkpoint."""

from __future__ import annotations

from neox.config import NeoXConfig
from neox.inference import modes
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Generate in the configured mode. Collective over the world."""
    if config.text_gen_type == "interactive":
        modes.interactive(load_model(config, groups), build_tokenizer(config), config)
        return
    job = modes.prepare(config, groups)
    tokenizer = build_tokenizer(config)
    modes.write_completions(load_model(config, groups), tokenizer, config, job)
