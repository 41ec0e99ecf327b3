"""Adapters of a model as whole tensors: put into its layers, and found among folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from neox.checkpoint.folders import latest_name
from neox.errors import CheckpointError
from neox.model.gpt import Layer
from neox.model.lora import Specs
from neox.model.packed import Packed
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups

SETTINGS = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"

Name = tuple[int, str]  # a layer's index, and what its file calls the tensor


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters, and the parameters of the base that were trained beside them.

    `tensors` are whole, in any floating-point type: (3, "attention.dense.adapter.lora_A")
    [rank, K] and its lora_B [N, rank] for each of `specs`; (3, "mlp.linear2.bias") and norms take
    the place of the base's. `copies` are tensors of the base itself, which PEFT may put beside an
    output projection's adapter; they tell whether it is the same base.
    """

    specs: Specs
    tensors: Mapping[Name, Tensor] = field(repr=False)
    copies: Mapping[Name, Tensor] = field(repr=False, default_factory=dict)

    @property
    def biases(self) -> bool:
        """Whether there are biases, norms' apart."""
        return any(name.endswith(".bias") and not is_norm(name) for _, name in self.tensors)

    @property
    def norms(self) -> bool:
        return any(is_norm(name) for _, name in self.tensors)

    def of(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer by name."""
        return {name: tensor for (at, name), tensor in self.tensors.items() if at == index}


def is_norm(name: str) -> bool:
    """Whether a parameter, by its name in a layer's file, is of a norm."""
    return "norm" in name.rpartition(".")[0]


def half(matrix: str, letter: str) -> str:
    """What A, or B, of a matrix's adapter is called: attention.dense.adapter.lora_A."""
    return f"{matrix}.adapter.lora_{letter}"


@torch.no_grad()
def fill(module: nn.Module, layer: Layer, adapters: Adapters, groups: ProcessGroups) -> None:
    """Copy this rank's shards into `module`, which was built as `layer` with `adapters.specs`.

    They take the precision of the parameters. The base's own weights have to be there already: a
    copy of them that came with the adapters is compared. Not collective. Raises CheckpointError
    when it is not the base's, or a number is too large for float16.
    """
    assert layer.layout is not None
    layout = layer.layout | layer.adapters
    parameters = dict(module.named_parameters())
    for (index, name), copy in adapters.copies.items():
        base = _exact(module, name) if index == layer.index else None
        if base is not None:
            own = shard(copy, layout[name], groups.tp_rank, groups.tp)
            known = len(own)  # rows; those of the vocabulary beyond the copy's are padding
            if layout[name].is_vocab:
                known = max(0, min(known, len(copy) - groups.tp_rank * known))
            check_copy(name, own[:known], base[:known])
    for name, whole in adapters.of(layer.index).items():
        target = parameters[name]
        target.copy_(shard(whole, layout[name], groups.tp_rank, groups.tp))
        if not target.isfinite().all() and whole.isfinite().all():
            raise CheckpointError(
                f"adapter: {name} of layer {layer.index:02d} has numbers that float16 cannot hold, "
                "which ends at 65504. Use --set precision=bfloat16 or fp32."
            )


def _exact(module: nn.Module, name: str) -> Tensor | None:
    """A weight of a module; None if it is held in few bits."""
    place = attrgetter(name)(module)
    if isinstance(place, Packed):
        return place.dequantize() if place.bits == 32 else None
    return place if isinstance(place, Tensor) else None


def check_copy(name: str, copy: Tensor, base: Tensor) -> None:
    """Raises CheckpointError unless a tensor is the base's, but for rounding to 16 bits."""
    copy, base = copy.float(), base.detach().float().cpu()
    if copy.numel() and not torch.allclose(
        copy, base, rtol=2**-7, atol=1e-6
    ):  # bfloat16 has 8 bits
        difference = (copy - base).abs().max().item()
        raise CheckpointError(
            f"adapter: its copy of the base's {name} differs from the one here by up to "
            f"{difference:.3g}: it was made for another base, or that was trained as well."
        )


def find_adapter(path: Path) -> Path:
    """The folder of adapters at `path`: itself, or the step that its `latest` names.

    Raises CheckpointError telling what is there.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"adapter: {path} is not a folder. Name one that holds {SETTINGS}, or a folder of "
            "checkpoints that hold adapters."
        )
    if (path / SETTINGS).is_file():
        return path
    if name := latest_name(path):
        if (path / name / SETTINGS).is_file():
            return path / name
        raise CheckpointError(
            f"adapter: {path / name}, which `latest` names, holds no {SETTINGS}: it is no "
            "checkpoint of adapters."
        )
    if (path / SAFETENSORS).is_file() or (path / TORCH).is_file():
        raise CheckpointError(f"adapter: {path} is incomplete: {SETTINGS} is missing.")
    others = sorted(entry.name for entry in path.iterdir())[:5]
    raise CheckpointError(
        f"adapter: {path} holds no {SETTINGS} and no `latest`; "
        + (f"it holds {', '.join(others)}." if others else "it is empty.")
    )
