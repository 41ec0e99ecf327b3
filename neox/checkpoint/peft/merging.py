"""A checkpoint whose weights have the adapters in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neox.checkpoint.lazy import LazyTensors, Recipe
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft.adapters import Adapters, check_copy, find_adapter, half
from neox.checkpoint.peft.reading import read_adapters
from neox.checkpoint.reshard import cast
from neox.checkpoint.sources import Shard, Source
from neox.config import NeoXConfig
from neox.model.gpt import Layer, layers
from neox.model.layout import LayerLayout, ParamLayout
from neox.model.lora import adapter_layout
from neox.model.shard import file_shard, reshard
from neox.model.shard import shard as cut
from neox.parallel.groups import ProcessGroups


def with_adapter(checkpoint: Checkpoint, config: NeoXConfig, path: Path) -> Checkpoint:
    """`checkpoint` with the adapters at `path` in it: those that `find_adapter` finds.

    `config` tells the checkpoint's architecture. Not collective. Raises CheckpointError.
    """
    rows = checkpoint.padded_vocab_size
    adapters = read_adapters(find_adapter(path), config, rows)
    model = layers(config, rows, torch.float32, ProcessGroups.single())
    return merged(checkpoint, adapters, model)


def merged(checkpoint: Checkpoint, adapters: Adapters, model: Sequence[Layer]) -> Checkpoint:
    """`checkpoint` with W + scaling B A in place of W, and what else was trained in its place.

    A shard of a tensor is computed whenever it is read, in float32, and rounded to the precision
    of the file. `model` is the checkpoint's, whose own files are still what is verified. Not
    collective. Raises CheckpointError when the adapters came with copies of another base's tensors,
    and later when a number is too large for the precision.
    """
    layouts = {layer.index: layer.layout for layer in model if layer.has_file and layer.layout}
    for (index, name), copy in adapters.copies.items():
        stored = [shard.tensors[name] for shard in checkpoint.shards(index)]
        base = reshard(stored, _as_stored(layouts[index][name], stored[0], checkpoint.tp), 0, 1)
        check_copy(name, copy[: len(base)], base[: len(copy)])
    source = _Merged(checkpoint.source, adapters, layouts)
    return Checkpoint(checkpoint.folder, source, checkpoint.manifest, checkpoint.verified)


class _Merged:
    """The source of a checkpoint with adapters in it."""

    def __init__(
        self, base: Source, adapters: Adapters, layouts: Mapping[int, LayerLayout]
    ) -> None:
        self.tp = base.tp
        self._base, self._adapters, self._layouts = base, adapters, layouts

    @property
    def indices(self) -> Collection[int]:
        return self._base.indices

    def files(self, index: int) -> list[Path]:
        return self._base.files(index)

    def shards(self, index: int) -> list[Shard]:
        layout, found = self._layouts.get(index, {}), []
        for rank, shard in enumerate(self._base.shards(index)):
            merged = _Merging(shard.tensors, self._adapters, index, layout, rank, self.tp)
            recipes = {
                name: Recipe.like(shard.described(name), partial(merged.make, name))
                for name in shard.tensors
            }
            # The stored codes are those of the weights without the adapters.
            found.append(replace(shard, tensors=LazyTensors(recipes), eight_bit={}))
        return found


@dataclass(frozen=True)
class _Merging:
    """One shard of a layer, computed as it is read."""

    stored: Mapping[str, Tensor]
    adapters: Adapters
    index: int
    layout: LayerLayout
    rank: int
    tp: int

    def make(self, name: str) -> Tensor:
        stored = self.stored[name]
        if (self.index, name) in self.adapters.tensors:
            whole = cast(self.adapters.tensors[self.index, name], stored.dtype)
            return self._own(whole, self.layout[name], stored)
        matrix = name.removesuffix(".weight")
        spec = self.adapters.specs.get((self.index, matrix))
        if spec is None or matrix == name:
            return stored
        layouts = adapter_layout(self.layout, {matrix: spec})
        down, up = (
            self._own(self.adapters.tensors[self.index, key].float(), layouts[key], stored)
            for key in (half(matrix, "A"), half(matrix, "B"))
        )
        return cast(torch.addmm(stored.float(), up, down, alpha=spec.scaling), stored.dtype)

    def _own(self, whole: Tensor, layout: ParamLayout, stored: Tensor) -> Tensor:
        """What goes with this shard."""
        layout = _as_stored(layout, stored, self.tp)
        return file_shard(cut(whole, layout, self.rank, self.tp), layout, self.rank, self.tp)


def _as_stored(layout: ParamLayout, shard: Tensor, tp: int) -> ParamLayout:
    """With as many vocabulary rows as the files have, of which `shard` is a tensor."""
    if not layout.is_vocab:
        return layout
    return replace(layout, shape=(len(shard) * tp, *layout.shape[1:]))
