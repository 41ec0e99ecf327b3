"""Models of which most weights are frozen: held in few bits, trained by adapters, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from neox.config import NeoXConfig
from neox.model.four_bit import FourBit
from neox.model.layout import LayerLayout, ParamLayout
from neox.model.lora import AdapterSpec, Specs, adapter_layout, attach
from neox.model.packed import Packed
from neox.model.quantized import EightBit
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import DropoutStreams

Storage = Literal["dense", "8bit", "packed", "int8", "int4"]
_BITS = {"packed": 32, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Frozen:
    """How a layer's weights are held, and which of them are trained besides its adapters.

    `storage` of its matrices and its table of tokens, for a checkpoint to fill: `dense`; `8bit` is
    EightBit; `packed`, `int8` and `int4` are Packed, of 32, 8 and 4 bits, on a CPU; elsewhere the
    last two are EightBit and FourBit. A table of tokens that is no output projection is only looked
    up: it stays dense instead of packed, and has 8 bits for 4.
    `biases` and `norms` say whether those are trained; a norm's bias is a norm's.
    """

    dtype: torch.dtype
    groups: ProcessGroups
    storage: Storage = "dense"
    specs: Specs = field(default_factory=dict)
    biases: bool = False
    norms: bool = False
    streams: DropoutStreams | None = None

    @classmethod
    def of_run(
        cls, config: NeoXConfig, dtype: torch.dtype, groups: ProcessGroups, streams: DropoutStreams
    ) -> Frozen:
        """What the block `lora` asks to be trained."""
        values = config.lora_values
        return cls(
            dtype,
            groups,
            "8bit" if config.load_in_8bit else "dense",
            configured_specs(config),
            values["biases"],
            values["norms"],
            streams,
        )

    def of(self, index: int) -> Mapping[str, AdapterSpec]:
        """The adapters of one layer by the names of their matrices."""
        return {name: spec for (at, name), spec in self.specs.items() if at == index}

    def adapters(self, index: int, layout: LayerLayout) -> LayerLayout:
        return adapter_layout(layout, self.of(index))

    def trained(self, index: int, layout: LayerLayout) -> LayerLayout:
        """The layout of what is trained of a layer that is laid out so."""
        chosen = {name: param for name, param in layout.items() if self._is_trained(name)}
        return chosen | self.adapters(index, layout)

    def treat(
        self, module: nn.Module, index: int, layout: LayerLayout, *, is_tied: bool = False
    ) -> None:
        """Make a layer that was just built, and has no values yet, what it is to be."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self._is_trained(name))
        for name, param in layout.items():
            only_table = param.is_vocab and index == 0 and not is_tied
            place = self._place(param, only_table) if is_matrix(param) else None
            if place is not None:
                owner = module.get_submodule(name.removesuffix(".weight"))
                del owner.weight
                owner.weight = place
        attach(module, layout, self.of(index), self.dtype, self.groups, self.streams)

    def _place(self, param: ParamLayout, only_table: bool) -> EightBit | FourBit | Packed | None:
        """What holds a matrix instead of a parameter."""
        rows, columns = param.shard_shape(self.groups.tp)
        if self.storage == "8bit":
            return EightBit.empty(rows, columns)
        if self.storage == "dense" or (self.storage == "packed" and only_table):
            return None
        bits = 8 if only_table else _BITS[self.storage]
        if self.groups.device.type == "cpu":
            return Packed(bits, rows, columns)
        return EightBit.empty(rows, columns) if bits == 8 else FourBit(rows, columns)

    def _is_trained(self, name: str) -> bool:
        if "norm" in name.split(".")[-2]:
            return self.norms
        return self.biases and name.endswith(".bias")


def configured_specs(config: NeoXConfig) -> Specs:
    """An adapter for every target that the block `lora` names."""
    values, depth = config.lora_values, config.num_layers
    spec = AdapterSpec(values["rank"], values["alpha"] / values["rank"], values["dropout"])
    specs: dict[tuple[int, str], AdapterSpec] = {}
    for name in config.lora_targets:
        where = [depth + 4] if name == "final_linear" else range(2, depth + 2)
        specs |= {(index, name): spec for index in where}
    return specs


def is_matrix(layout: ParamLayout) -> bool:
    """Whether it is a linear layer's weight or the table of tokens."""
    return layout.dim is not None and len(layout.shape) == 2
