"""LoRA (Hu et al., arXiv:2106.09685): a frozen W gets B A scaling, of which A and B are trained.

Where W is cut by its rows over the tp ranks, so is B, and A is whole on every rank; where W is cut
by its columns, so is A, and B is whole. The gradient of the whole one is summed over the ranks in a
message of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.model.layout import Init, LayerLayout, ParamLayout, Split
from neox.model.packed import Packed, pack
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import copy_to_tensor_parallel, linear
from neox.parallel.rng import DropoutStreams, derive_seed


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: A [rank, K], B [N, rank]; `scaling` is alpha / rank, x is what is dropped of."""

    rank: int
    scaling: float
    dropout: float = 0.0


Specs = Mapping[tuple[int, str], AdapterSpec]  # by the layer's index and the name of its matrix


class Adapter(nn.Module):
    """x [..., K] -> its part of the product, [..., N]; this rank's part of it at tp > 1."""

    def __init__(
        self,
        weight_shape: tuple[int, int],
        layout: ParamLayout,
        spec: AdapterSpec,
        dtype: torch.dtype,
        groups: ProcessGroups,
        streams: DropoutStreams | None,
    ) -> None:
        """`weight_shape` is that of this rank's shard of the matrix, `layout` the whole one's."""
        super().__init__()
        rows, columns = weight_shape
        self.lora_A = nn.Parameter(torch.empty(spec.rank, columns, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(rows, spec.rank, dtype=dtype))
        self.scaling, self.dropout = spec.scaling, spec.dropout
        self._splits_rows = layout.split is Split.COLUMN
        self._groups = groups
        self._streams = streams

    def low_rank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h, B) with h B^T the adapter's part of the product: h [..., rank], B [N, rank]."""
        down: Tensor = self.lora_A
        up: Tensor = self.lora_B
        if self._splits_rows:
            down = copy_to_tensor_parallel(down, self._groups)
        else:
            up = copy_to_tensor_parallel(up, self._groups)
        return linear(self._drop(x), down) * self.scaling, up

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.lora_A, self.lora_B
        if isinstance(down, Packed) and isinstance(up, Packed):
            return up.multiply(down.multiply(x) * self.scaling)
        return linear(*self.low_rank(x))

    def pack(self) -> None:
        """Compute by packed weights, for inference in float32: rows then depend on no other."""
        for name in ("lora_A", "lora_B"):
            weight = getattr(self, name)
            delattr(self, name)
            setattr(self, name, pack(weight.detach(), 32))

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        # Where each rank has columns of its own, each drops its own.
        own = not self._splits_rows and self._streams is not None
        with self._streams.local() if own and self._streams else contextlib.nullcontext():
            return F.dropout(x, self.dropout)


def adapter_layout(layout: LayerLayout, specs: Mapping[str, AdapterSpec]) -> LayerLayout:
    """The layouts of the adapters of a layer with `layout`; `specs` by the matrices' names."""
    made: LayerLayout = {}
    for name, spec in specs.items():
        base = layout[f"{name}.weight"]
        rows, columns = base.shape
        by_rows = base.split is Split.COLUMN
        made[f"{name}.adapter.lora_A"] = ParamLayout(
            (spec.rank, columns), Split.REPLICATED if by_rows else Split.ROW, Init.WEIGHT
        )
        made[f"{name}.adapter.lora_B"] = ParamLayout(
            (rows, spec.rank),
            Split.COLUMN if by_rows else Split.REPLICATED,
            Init.ZEROS,
            base.blocks if by_rows else (),
            base.is_vocab,
        )
    return made


def attach(
    module: nn.Module,
    layout: LayerLayout,
    specs: Mapping[str, AdapterSpec],
    dtype: torch.dtype,
    groups: ProcessGroups,
    streams: DropoutStreams | None,
) -> None:
    """Give the matrices of a built layer their adapters, allocated and not yet filled."""
    for name, spec in specs.items():
        owner, base = module.get_submodule(name), layout[f"{name}.weight"]
        rows, columns = base.shard_shape(groups.tp)
        owner.adapter = Adapter((rows, columns), base, spec, dtype, groups, streams)


def pack_adapters(module: nn.Module) -> None:
    """`Adapter.pack` of all that a layer has."""
    for part in list(module.modules()):
        if isinstance(part, Adapter):
            part.pack()


@torch.no_grad()
def start(
    module: nn.Module, adapters: LayerLayout, index: int, seed: int, groups: ProcessGroups
) -> None:
    """Begin with no change: B zeros, A uniform within sqrt(1 / K), as PEFT does.

    The same adapters from the same seed at every grid.
    """
    for name, layout in adapters.items():
        whole = torch.zeros(layout.shape)
        if name.endswith("lora_A"):
            bound = math.sqrt(1.0 / layout.shape[1])
            generator = torch.Generator().manual_seed(derive_seed(seed, index, name))
            whole.uniform_(-bound, bound, generator=generator)
        module.get_parameter(name).copy_(shard(whole, layout, groups.tp_rank, groups.tp))
