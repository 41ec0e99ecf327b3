"""8-bit Adam of bitsandbytes: the one place that knows its state.

A tensor's moments are kept as codes of one byte, a scale for each 256 of them, and the table of
256 values that the codes stand for. Tensors of fewer than 4096 elements keep theirs in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neox.model.quantized import silently

_BLOCK = 256
_WRAPPED = "__bnb_optimizer_quant_state__"  # its state_dict puts codes and tables one level down
_MOMENTS = {"1": "exp_avg", "2": "exp_avg_sq"}  # by the digit its names end with
_TABLES = {"1": "dynamic", "2": "udynamic"}  # of signed numbers, and of others


@dataclass(frozen=True)
class Quantized:
    """A vector of codes, each of which stands for table[code] * scale of its block."""

    codes: Tensor
    scales: Tensor
    table: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def cut(self, start: int, size: int) -> Tensor:
        """Elements from `start`, as a vector of fp32."""
        first, last = start // _BLOCK, -(-(start + size) // _BLOCK)
        scales = self.scales[first:last].repeat_interleave(_BLOCK)
        codes = self.codes.view(-1)[start : start + size]
        return self.table[codes.int()] * scales[start - first * _BLOCK :][:size]


def moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor's saved state under the names of Adam's, 8-bit vectors as Quantized.

    State of other optimizers comes back as it is. Raises KeyError for what is incomplete.
    """
    state = {**state, **state.get(_WRAPPED, {})}
    state.pop(_WRAPPED, None)
    if "state1" not in state:
        return state
    found = {"step": state["step"]}
    for digit, name in _MOMENTS.items():
        values = state[f"state{digit}"]
        if values.dtype == torch.uint8:
            values = Quantized(values, state[f"absmax{digit}"], state[f"qmap{digit}"])
        found[name] = values
    return found


def build_adam8bit(groups: list[dict[str, object]], **settings: Any) -> Optimizer:
    with silently():
        from bitsandbytes.optim import AdamW8bit
    optimizer: Optimizer = AdamW8bit(groups, **settings)
    return optimizer


def is_eight_bit(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def state_bits(optimizer: Optimizer) -> int:
    return 8 if is_eight_bit(optimizer) else 32


def quantized(optimizer: Any, parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """8-bit Adam's own state of a parameter, from `exp_avg`, `exp_avg_sq` and `step` in fp32."""
    with silently():
        from bitsandbytes.functional import quantize_blockwise
    own: dict[str, Any] = {"step": int(state["step"])}
    for digit, name in _MOMENTS.items():
        if parameter.numel() < optimizer.args.min_8bit_size:
            own[f"state{digit}"] = state[name]
            continue
        table = optimizer.name2qmap[_TABLES[digit]].to(parameter.device)
        codes, made = quantize_blockwise(state[name], table, blocksize=_BLOCK)
        own |= {f"state{digit}": codes, f"qmap{digit}": table, f"absmax{digit}": made.absmax}
    return own
