"""From a configuration to an engine that is ready to train."""

from __future__ import annotations

from torch import nn

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import Adapters
from neox.checkpoint.peft import fill as fill_adapters
from neox.config import NeoXConfig
from neox.engine.base import Engine
from neox.engine.deepspeed import start_deepspeed
from neox.engine.memory import keep_freed_memory
from neox.engine.pipelined import build_pipelined
from neox.engine.sequential import build_sequential
from neox.model.frozen import Frozen
from neox.model.gpt import Layer, layers, torch_dtype
from neox.model.init import initialize
from neox.model.lora import start as start_adapters
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion
from neox.parallel.rng import DropoutStreams


def build_engine(
    config: NeoXConfig,
    groups: ProcessGroups,
    padded_vocab_size: int,
    checkpoint: Checkpoint | None = None,
    adapters: Adapters | None = None,
) -> Engine:
    """Weights come from `checkpoint`, or from the initialisation that the configuration names.

    With `lora` they stay as they are, and what is trained starts from `adapters`, or as no change.
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
        if adapters is not None:
            fill_adapters(module, layer, adapters, groups)
        else:
            start_adapters(module, layer.adapters, layer.index, config.seed, groups)

    region = TensorParallelRegion(groups, sequence_parallel=config.sequence_parallel)
    dtype, frozen = torch_dtype(config.dtype), None
    if config.lora is not None:
        frozen = Frozen.of_run(config, dtype, groups, streams)
    model = layers(config, padded_vocab_size, dtype, groups, streams, region, frozen)
    build = build_sequential if config.pipe_parallel_size == 0 else build_pipelined
    engine = build(config, model, fill, streams, region, groups)
    if groups.device.type == "cpu":
        keep_freed_memory()  # from now on: what loading took and let go is not needed again
    return engine
