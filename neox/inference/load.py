"""From a configuration to a model that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neox.checkpoint.neox import Checkpoint, check_tokens
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.inference.stages import InferenceModel
from neox.model.gpt import layers, partition, torch_dtype
from neox.model.layout import pad_vocab_size
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer


def load_model(config: NeoXConfig, groups: ProcessGroups) -> InferenceModel:
    """Build this rank's stage and fill it from `config.load` at `config.iteration` or `latest`.

    The checkpoint may have any number of shards. Its padded vocabulary is kept, so the model is
    the one that was trained at every grid.
    Not collective. Raises CheckpointError when there is no checkpoint or it does not fit.
    """
    if config.load is None:
        raise CheckpointError(
            "load is not set: there is no checkpoint to generate from or evaluate. Set `load` to "
            "the folder that holds `latest` and the global_step folders."
        )
    checkpoint = Checkpoint.open(Path(config.load), config.iteration)
    padded_vocab_size = checkpoint.padded_vocab_size
    dtype = torch_dtype(config.dtype)
    # Where tp does not divide the vocabulary, the last shard has rows that InferenceModel cuts off.
    model = layers(config, pad_vocab_size(padded_vocab_size, 1, groups.tp), dtype, groups)
    stage = []
    tied: dict[str, Any] = {}
    for index in partition(config.num_layers, groups.pp)[groups.pp_rank]:
        layer = model[index]
        if layer.tied in tied:
            module = tied[layer.tied]
        else:
            module = layer.build()
            if layer.has_parameters:
                checkpoint.load_into(module, layer, groups)
                module.to(groups.device)
            if layer.tied:
                tied[layer.tied] = module
        stage.append((layer, module))
    return InferenceModel(config, groups, stage, padded_vocab_size, dtype)


def check_vocabulary(model: InferenceModel, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError when the tokenizer has tokens that the model has no row for."""
    check_tokens(tokenizer.vocab_size, model.padded_vocab_size)
