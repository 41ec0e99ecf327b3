"""`./deepy.py generate.py`: text from a checkpoint."""

from __future__ import annotations

from neox.cluster.run_folder import claim_interrupts
from neox.config import NeoXConfig
from neox.inference import modes
from neox.inference.interactive import interactive
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Generate in the configured mode. Collective over the world."""
    job = modes.prepare(config, groups) if config.text_gen_type != "interactive" else None
    tokenizer = build_tokenizer(config)
    model = load_model(config, groups, tokens=tokenizer.vocab_size)
    if job is None:
        interactive(model, tokenizer, config, claim_interrupts)
    else:
        modes.write_completions(model, tokenizer, config, job)
