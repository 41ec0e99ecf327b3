"""Optimizer state as runs saved it, parameter by parameter, whatever the grid.

ZeRO keeps the state of a part of the model (a tp rank's share of a pipeline stage) as flat vectors,
one for each optimizer group, cut over the replicas; its files tell where each parameter lies in
them. A parameter is known by its place: the NeoX index of its layer, and its name in there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from torch import Tensor

from neox.checkpoint.optimizer_files import OptimizerFiles
from neox.checkpoint.sources import load_model_file, model_file
from neox.engine.checkpoint_engine import load_deepspeed_file
from neox.engine.eight_bit import Quantized, moments
from neox.errors import CheckpointError
from neox.model.gpt import Layer
from neox.model.layout import ParamLayout, Split
from neox.model.shard import reshard

Place = tuple[int, str]


def parameter_name(layer: Layer, name: str, *, pipelined: bool) -> str:
    """What DeepSpeed calls a parameter, in a pipeline's module or in neox.engine.sequential's."""
    if not pipelined:
        return f"sequential.{layer.index}.{name}"
    return f"tied_modules.{layer.tied}.{name}" if layer.tied else f"{layer.index}.{name}"


@dataclass(frozen=True)
class ParameterState:
    """One parameter's state: shards by kind ("exp_avg", ...), one for each tp rank that saved it.

    The kind "fp32" is the weight itself. `step` is Adam's.
    """

    shards: dict[str, list[Tensor]]
    step: float | None

    def whole(self, layout: ParamLayout) -> dict[str, Tensor]:
        """The whole tensor of each kind."""
        layout = in_memory(layout)
        return {kind: reshard(shards, layout, 0, 1) for kind, shards in self.shards.items()}


def in_memory(layout: ParamLayout) -> ParamLayout:
    """How a parameter's state is held: whole where it is a summand in layer files."""
    if layout.split is Split.PARTIAL_SUM:
        return replace(layout, split=Split.REPLICATED)
    return layout


class SavedState(Protocol):
    """A run's optimizer state. Not collective."""

    model: dict[str, Any]  # the contents of an mp_rank file
    shared: dict[str, Any]  # what DeepSpeed's optimizer keeps besides, such as the loss scale

    def of(self, place: Place, layout: ParamLayout) -> ParameterState:
        """What was saved of a parameter. Raises CheckpointError."""


@dataclass(frozen=True)
class _Fragment:
    """A parameter's piece in one replica's vectors."""

    vectors: dict[str, Tensor | Quantized]
    step: float | None
    start: int
    size: int

    def cut(self, kind: str) -> Tensor:
        vector = self.vectors[kind]
        if isinstance(vector, Quantized):
            return vector.cut(self.start, self.size)
        return vector.narrow(0, self.start, self.size)


class ZeroState:
    """The state in ZeRO's files, memory-mapped. Raises CheckpointError."""

    def __init__(self, folder: Path, files: OptimizerFiles, layers: list[Layer]) -> None:
        self.folder = folder
        self.tp = files.tp
        self.model = load_model_file(model_file(folder, 0))
        self.shared: dict[str, Any] = {}
        places = {
            parameter_name(layer, name, pipelined=pipelined): (layer.index, name)
            for layer in layers
            if layer.has_file
            for name in layer.trained
            for pipelined in (False, True)
        }
        stages: dict[Place, int] = {}
        self._fragments: dict[Place, list[list[_Fragment]]] = {}  # by tp rank, by replica
        for stage, rank, replica in product(range(files.pp), range(files.tp), range(files.dp)):
            path = files.path(folder, stage * files.tp + rank, replica)
            model = load_model_file(model_file(folder, stage * files.tp + rank))
            shapes = model.get("param_shapes") or []
            self.shared, fragments = _read(path, shapes, replica, files.dp)
            for name, fragment in fragments:
                place = places.get(name)
                # The last stage has the tied embedding too, equal to the first one's.
                if place is not None and stages.setdefault(place, stage) == stage:
                    ranks = self._fragments.setdefault(place, [[] for _ in range(files.tp)])
                    ranks[rank].append(fragment)

    def of(self, place: Place, layout: ParamLayout) -> ParameterState:
        ranks = self._fragments.get(place, [])
        sizes = {sum(piece.size for piece in rank) for rank in ranks}
        shape = list(layout.shape)
        if layout.dim is not None:  # a vocabulary may have had other rows than now
            rows = (
                sum(sizes) // prod(shape[1:]) if layout.is_vocab else shape[layout.dim] // self.tp
            )
            shape[layout.dim] = rows
        if sizes != {torch.Size(shape).numel()}:
            index, name = place
            raise CheckpointError(
                f"{self.folder}: its optimizer files do not hold {name} of layer {index:02d} in "
                f"the configuration's shape, {list(layout.shape)}"
            )
        return ParameterState(
            {
                kind: [torch.cat([piece.cut(kind) for piece in rank]).view(shape) for rank in ranks]
                for kind in ranks[0][0].vectors
            },
            ranks[0][0].step,
        )


class _Span(NamedTuple):
    start: int
    numel: int


def _read(
    path: Path, shapes: list[dict[str, torch.Size]], replica: int, replicas: int
) -> tuple[dict[str, Any], list[tuple[str, _Fragment]]]:
    """One replica's file: what is of no parameter, and each fragment by DeepSpeed's name.

    `shapes` are those of every vector's parameters, as the mp_rank file has them.
    """
    contents = load_deepspeed_file(path, mmap=True)
    fragments = []
    try:
        state = contents[OPTIMIZER_STATE_DICT]
        mappings: list[dict[str, Any]]
        if state.get(ZERO_STAGE) == 3:
            saved, masters = state[OPTIMIZER_STATE_DICT]["state"], state[FP32_FLAT_GROUPS]
            mappings = [_shares(group_shapes, replica, replicas) for group_shapes in shapes]
        else:
            saved = state[BASE_OPTIMIZER_STATE]["state"]
            masters = state[SINGLE_PARTITION_OF_FP32_GROUPS]
            mappings = state[PARAM_SLICE_MAPPINGS]
        for group, mapping in enumerate(mappings):
            values = {"fp32": masters[group].detach(), **moments(saved.get(group, {}))}
            step = values.pop("step", None)
            step = None if step is None else float(step)
            vectors = {kind: value for kind, value in values.items() if value is not None}
            end = max((at.start + at.numel for at in mapping.values()), default=0)
            if odd := [kind for kind, value in vectors.items() if not _reaches(value, end)]:
                raise CheckpointError(
                    f"{path}: its {', '.join(odd)} cannot be divided anew for another grid"
                )
            fragments += [
                (name, _Fragment(vectors, step, at.start, at.numel)) for name, at in mapping.items()
            ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an optimizer file of ZeRO") from error
    return state, fragments


def _shares(shapes: dict[str, torch.Size], replica: int, replicas: int) -> dict[str, _Span]:
    """Where a replica's share of each parameter lies in its vector at stage 3.

    There, every parameter is cut over the replicas for itself, the last share filled up.
    """
    spans, start = {}, 0
    for name, shape in shapes.items():
        share = -(-shape.numel() // replicas)
        left = shape.numel() - replica * share
        spans[name] = _Span(start, max(0, min(share, left)))
        start += share
    return spans


def _reaches(value: Any, end: int) -> bool:
    """Whether it has a value of its own for each of a group's elements up to `end`."""
    return isinstance(value, Tensor | Quantized) and len(value.shape) == 1 and value.shape[0] >= end
