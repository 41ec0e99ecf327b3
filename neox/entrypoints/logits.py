"""`tools/checkpoint.py logits`: a checkpoint's logits for given token ids."""

from __future__ import annotations

from pathlib import Path

from neox.config import NeoXConfig
from neox.inference.load import load_model
from neox.inference.logits import check_output, read_tokens, write_logits
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """From `sample_input_file` to `sample_output_file`. Collective over the world."""
    assert config.sample_input_file is not None and config.sample_output_file is not None
    tokens = read_tokens(Path(config.sample_input_file))
    output = Path(config.sample_output_file)
    if groups.rank == 0:
        check_output(output)
    model = load_model(config, groups, tokens=_vocab_size(config))
    if groups.dp_rank == 0:  # other replicas would compute the same
        write_logits(model, tokens, output)


def _vocab_size(config: NeoXConfig) -> int | None:
    """The tokenizer's size, which a configuration's own padding starts from; None without one."""
    if config.vocab_file is None or not Path(config.vocab_file).exists():
        return None
    return build_tokenizer(config).vocab_size
