"""Checkpoints of random weights in NeoX's layout, at any size: to test and to measure with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neox import log
from neox.checkpoint.directory import write_checkpoint
from neox.checkpoint.files import save_file
from neox.checkpoint.lock import saving_alone
from neox.checkpoint.manifest import Entry
from neox.checkpoint.reshard import check_free
from neox.checkpoint.run_state import save_run_state
from neox.checkpoint.sources import layer_file, legacy_name
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.model.gpt import Layer, layers, torch_dtype
from neox.model.init import draw
from neox.model.layout import Init, ParamLayout
from neox.model.positions import frequencies
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import derive_seed

# Of biases, and of norms' scales around 1: what starts at a constant would hide what mixes it up.
_STD = 0.02
_ITERATION = 0


def synthesize(directory: Path, config: NeoXConfig, rows: int, *, legacy_names: bool) -> Path:
    """Write config.tp shards of random weights in config's precision; return their folder.

    Weights follow the configuration's initialisation and seed, and are the same at every tp.
    `rows` is the padded vocabulary. `legacy_names` are those of the 20B and Pythia files, with the
    rotary frequencies that they hold. Memory holds one layer, and one tensor in float32. Not
    collective, one process. Raises CheckpointError.
    """
    check_free(directory, _ITERATION)
    model = layers(config, rows, torch_dtype(config.dtype), ProcessGroups.single())
    with_files = [layer for layer in model if layer.has_file]

    def write(folder: Path) -> Mapping[str, Entry]:
        written = {}
        with log.progress(total=len(with_files) * config.tp, desc="writing", unit="file") as bar:
            for layer in with_files:
                for rank, tensors in enumerate(_shards(layer, config, legacy_names)):
                    path = layer_file(folder, layer.index, rank)
                    written[path.name] = save_file(tensors, path)
                    bar.update()
        return written | save_run_state(folder, _ITERATION, config.tp, {})

    with saving_alone(directory, ProcessGroups.single()):  # a run's unfinished save is its own
        return write_checkpoint(
            directory,
            _ITERATION,
            write,
            config.config_files or {},
            ProcessGroups.single(),
            grid={"tp": config.tp, "pp": 1, "dp": 1},
            padded_vocab_size=rows,
            architecture=architecture(config),
        )


def _shards(layer: Layer, config: NeoXConfig, legacy_names: bool) -> list[dict[str, Tensor]]:
    """What the files of a layer hold."""
    assert layer.layout is not None
    dtype = torch_dtype(config.dtype)
    shards: list[dict[str, Tensor]] = [{} for _ in range(config.tp)]
    for name, layout in layer.layout.items():
        generator = torch.Generator().manual_seed(derive_seed(config.seed, layer.index, name))
        whole = _random(layout, config, generator)
        for rank, tensors in enumerate(shards):
            held = shard(whole, layout, rank, config.tp).to(dtype)
            written = legacy_name(name) if legacy_names else name
            tensors[written] = file_shard(held, layout, rank, config.tp)
        del whole  # before the next is drawn
    is_block = 2 <= layer.index < 2 + config.num_layers
    has_buffer = config.pos_emb == "rotary" and not config.rotary_interleaved
    if legacy_names and is_block and has_buffer:
        buffer = frequencies(config.rotary_dim, config.rotary_emb_base).to(dtype)
        for tensors in shards:
            tensors["attention.rotary_emb.inv_freq"] = buffer
    return shards


def _random(layout: ParamLayout, config: NeoXConfig, generator: torch.Generator) -> Tensor:
    """The whole tensor in float32."""
    whole = torch.empty(layout.shape)
    draw(whole, layout, config, generator)
    if layout.init in (Init.ZEROS, Init.ONES):
        whole += torch.empty_like(whole).normal_(0.0, _STD, generator=generator)
    return whole
