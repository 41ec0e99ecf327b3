"""`tools/checkpoint.py logits`: a checkpoint's logits for given token ids."""

from __future__ import annotations

from pathlib import Path

from neox.config import NeoXConfig
from neox.inference.load import load_model
from neox.inference.logits import check_output, read_tokens, write_logits
from neox.parallel.groups import ProcessGroups


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """From `sample_input_file` to `sample_output_file`. Collective over the world."""
    assert config.sample_input_file is not None and config.sample_output_file is not None
    tokens = read_tokens(Path(config.sample_input_file))
    output = Path(config.sample_output_file)
    if groups.rank == 0:
        check_output(output)
    model = load_model(config, groups)
    if groups.dp_rank == 0:  # other replicas would compute the same
        write_logits(model, tokens, output)
