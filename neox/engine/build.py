"""From a configuration to an engine that is ready to train."""

from __future__ import annotations

from torch import nn

from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.engine.base import Engine
from neox.engine.deepspeed import start_deepspeed
from neox.engine.pipelined import build_pipelined
from neox.engine.sequential import build_sequential
from neox.model.gpt import Layer, layers, torch_dtype
from neox.model.init import initialize
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


def build_engine(
    config: NeoXConfig,
    groups: ProcessGroups,
    padded_vocab_size: int,
    checkpoint: Checkpoint | None = None,
) -> Engine:
    """Weights come from `checkpoint`, or from the initialisation that the configuration names.

    Collective over the world. The precision of the weights is the configuration's; with 16 bit,
    DeepSpeed keeps float32 masters, made from these.
    """
    start_deepspeed(groups)
    streams = DropoutStreams(config.seed, groups)

    def fill(module: nn.Module, layer: Layer) -> None:
        if checkpoint is not None:
            checkpoint.load_into(module, layer, groups)
        else:
            initialize(module, layer, config, config.seed, groups)

    region = TensorParallelRegion(groups, sequence_parallel=config.sequence_parallel)
    model = layers(config, padded_vocab_size, torch_dtype(config.dtype), groups, streams, region)
    build = build_sequential if config.pipe_parallel_size == 0 else build_pipelined
    return build(config, model, fill, streams, region, groups)
