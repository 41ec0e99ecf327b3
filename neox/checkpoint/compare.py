"""Whether two checkpoints are of the same weights, whatever their shards, names and precisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from neox import log
from neox.checkpoint.architecture import recorded
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import check_layers
from neox.config import ModelConfig
from neox.config.architecture import same
from neox.config.values import show
from neox.model.gpt import Layer, layers
from neox.model.layout import ParamLayout
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups

_CHUNK = 1 << 24  # elements compared at a time: 256 MiB of double precision
_SINGLE = ProcessGroups.single()


class Verdict(Enum):
    BITWISE = "bitwise equal"
    VALUES = "equal in value"  # the same numbers in another precision, or zeros of another sign
    DIFFERENT = "different"
    SHAPES = "of different shapes"
    ONLY_FIRST = "only in the first"
    ONLY_SECOND = "only in the second"

    @property
    def is_same(self) -> bool:
        return self in (Verdict.BITWISE, Verdict.VALUES)


@dataclass(frozen=True)
class Comparison:
    """One whole tensor of both, by today's name. `detail` is for the reader; "" where all is said.

    `largest` is the largest absolute difference, NaN where one has a NaN that the other has not.
    """

    layer: int
    name: str
    verdict: Verdict
    largest: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        parts = [f"layer {self.layer:02d} {self.name}: {self.verdict.value}"]
        parts += [f"by up to {self.largest:.3g}"] if self.verdict is Verdict.DIFFERENT else []
        parts += [f"({self.detail})"] if self.detail else []
        return " ".join(parts)


def compare_architectures(first: Checkpoint, second: Checkpoint) -> list[str]:
    """What both tell about their architecture and tell differently. Raises CheckpointError."""
    one, other = recorded(first), recorded(second)
    pairs = [(name, one[name], other[name]) for name in one if name in other]
    return [
        f"{name} is {show(a.value)} ({a.where}) and {show(b.value)} ({b.where})"
        for name, a, b in pairs
        if not same(a.value, b.value, max(a.tolerance, b.tolerance))
    ]


def compare(
    first: Checkpoint, first_config: ModelConfig, second: Checkpoint, second_config: ModelConfig
) -> Iterator[Comparison]:
    """Compare tensor by tensor, in the order of the layers; buffers are not compared.

    The configurations tell how each checkpoint's tensors are split. Every file is verified before
    it is read. Memory holds one tensor of each. Not collective. Raises CheckpointError.
    """
    one, other = _by_index(first, first_config), _by_index(second, second_config)
    indices = sorted(one.keys() | other.keys())
    with (
        first.verifying_ahead(one.values(), _SINGLE),
        second.verifying_ahead(other.values(), _SINGLE),
        log.progress(total=len(indices), desc="comparing", unit="layer") as bar,
    ):
        for index in indices:
            ours, theirs = _tensors(first, one.get(index)), _tensors(second, other.get(index))
            for name in dict.fromkeys([*ours, *theirs]):
                if name not in theirs:
                    yield Comparison(index, name, Verdict.ONLY_FIRST)
                elif name not in ours:
                    yield Comparison(index, name, Verdict.ONLY_SECOND)
                else:
                    verdict = compare_tensors(_whole(*ours[name]), _whole(*theirs[name]))
                    yield Comparison(index, name, *verdict)
            bar.update()


def compare_tensors(one: Tensor, other: Tensor) -> tuple[Verdict, float, str]:
    """The verdict, the largest absolute difference, and what else there is to say.

    Of different numbers of rows, such as vocabularies padded differently, those that both have are
    compared.
    """
    if one.shape != other.shape:
        shapes = f"{list(one.shape)} and {list(other.shape)}"
        if one.dim() == 0 or one.shape[1:] != other.shape[1:]:
            return Verdict.SHAPES, 0.0, shapes
        rows = min(len(one), len(other))
        verdict, largest, _ = compare_tensors(one[:rows], other[:rows])
        return Verdict.SHAPES, largest, f"{shapes}; the first {rows} rows are {verdict.value}"
    one, other = one.reshape(-1), other.reshape(-1)
    largest, is_bitwise = 0.0, one.dtype == other.dtype
    for a, b in zip(one.split(_CHUNK), other.split(_CHUNK), strict=True):
        if is_bitwise and torch.equal(_bits(a), _bits(b)):
            continue
        is_bitwise = False
        largest = _larger(largest, _largest_difference(a.double(), b.double()))
    precisions = "" if one.dtype == other.dtype else f"{_name(one)} and {_name(other)}"
    if is_bitwise:
        return Verdict.BITWISE, 0.0, ""
    return Verdict.VALUES if largest == 0 else Verdict.DIFFERENT, largest, precisions


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Infinities of one sign and NaNs in the same place are no difference."""
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().masked_fill_(same, 0.0)
    return difference.max().item() if difference.numel() else 0.0


def _larger(one: float, other: float) -> float:
    """Of the two, NaN before any number."""
    return one if one != one or one > other else other


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _by_index(checkpoint: Checkpoint, config: ModelConfig) -> dict[int, Layer]:
    model = layers(config, checkpoint.padded_vocab_size, torch.float32, _SINGLE)
    with_files = [layer for layer in model if layer.has_file]
    check_layers(checkpoint, with_files)
    return {layer.index: layer for layer in with_files}


def _tensors(
    checkpoint: Checkpoint, layer: Layer | None
) -> dict[str, tuple[ParamLayout, list[Tensor]]]:
    if layer is None:
        return {}
    checkpoint.verify_layer(layer.index, _SINGLE)
    return {name: (layout, shards) for name, layout, shards in checkpoint.tensors(layer)}


def _whole(layout: ParamLayout, shards: list[Tensor]) -> Tensor:
    return reshard(shards, layout, 0, 1)


def conclusion(found: Sequence[Comparison]) -> str:
    """How many tensors there are of each verdict: "54 tensors: 52 bitwise equal, 2 different"."""
    counts = Counter(each.verdict for each in found)
    parts = ", ".join(
        f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict]
    )
    return f"{len(found)} tensors: {parts}"
