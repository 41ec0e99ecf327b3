"""From a configuration to a model that generates."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from neox.checkpoint.neox import Checkpoint, check_tokens
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.inference.stages import InferenceModel
from neox.model.gpt import Layer, build_layers, layers, partition, torch_dtype
from neox.model.layout import pad_vocab_size
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer


def open_checkpoint(config: NeoXConfig) -> Checkpoint:
    """The one in `config.load`: of `config.iteration`, or the `latest`. Raises CheckpointError."""
    if config.load is None:
        raise CheckpointError(
            "load is not set: there is no checkpoint to generate from or evaluate. Set `load` to "
            "the folder that holds `latest` and the global_step folders."
        )
    return Checkpoint.open(Path(config.load), config.iteration)


def load_model(
    config: NeoXConfig, groups: ProcessGroups, checkpoint: Checkpoint | None = None
) -> InferenceModel:
    """Build this rank's stage and fill it from `checkpoint`, by default the configuration's.

    The checkpoint may have any number of shards. Its padded vocabulary is kept, so the model is
    the one that was trained at every grid.
    Not collective. Raises CheckpointError when there is no checkpoint or it does not fit.
    """
    checkpoint = checkpoint or open_checkpoint(config)
    padded_vocab_size = checkpoint.padded_vocab_size
    dtype = torch_dtype(config.dtype)
    # Where tp does not divide the vocabulary, the last shard has rows that InferenceModel cuts off.
    model = layers(config, pad_vocab_size(padded_vocab_size, 1, groups.tp), dtype, groups)
    mine = partition(config.num_layers, groups.pp)[groups.pp_rank]

    def fill(module: nn.Module, layer: Layer) -> None:
        checkpoint.load_into(module, layer, groups)
        module.to(groups.device)

    stage = build_layers(model[mine.start : mine.stop], fill)
    return InferenceModel(config, groups, stage, padded_vocab_size, dtype)


def check_vocabulary(model: InferenceModel, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError when the tokenizer has tokens that the model has no row for."""
    check_tokens(tokenizer.vocab_size, model.padded_vocab_size)
