"""Optimizer state without ZeRO: torch's own, in the mp_rank files, by parameter number.

The optimizer of a tp rank's share of a stage numbers its parameters group by group. Our files say
which parameter has which number. Upstream's don't: there, a stage's numbers follow the order of its
layers, those that decay before those that don't (neox.engine.optimizers), so that over all stages
each group has the parameters of the whole model in order, and where a stage ends need not be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint.directory import on_every_rank
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file, model_file
from neox.engine.eight_bit import Quantized, is_eight_bit, moments, quantized, state_bits
from neox.engine.optimizers import check_state, state_name, step_counter
from neox.engine.saved_state import ParameterState, Place, SavedState, in_memory
from neox.errors import CheckpointError
from neox.model.gpt import LocalLayers
from neox.model.layout import ParamLayout
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups

NUMBERED = "optimizer_parameters"  # in our files: the places by parameter number
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NOT_KEPT = ("module", "optimizer", NUMBERED)  # and random states, which ours don't need


class PlainState:
    """A SavedState without weights: those are the layer files'. Raises CheckpointError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        self.shared: dict[str, Any] = {}
        self._ranks: list[dict[Place, dict[str, Any]]] = []
        folder, tp = checkpoint.folder, checkpoint.tp
        stages = len(list(folder.glob("mp_rank_*_model_states.pt"))) // tp
        for rank in range(tp):
            files = [load_model_file(model_file(folder, s * tp + rank)) for s in range(stages)]
            try:
                self.model = _kept(files[0])
                self._ranks.append(_by_place(checkpoint, rank, files))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                raise CheckpointError(
                    f"{folder}: the optimizer state in {model_file(folder, rank).name} does not go "
                    "with the weights"
                ) from error
        known = [state for states in self._ranks for state in states.values()]
        # DeepSpeed's FusedAdam counts the steps of a group at its last parameter only.
        steps = [float(state["step"]) for state in known if state.get("step") is not None]
        self._step = max(steps, default=None)
        self._kinds = {kind for state in known for kind, value in state.items() if _is_kind(value)}

    def of(self, place: Place, layout: ParamLayout) -> ParameterState:
        return ParameterState(
            {
                kind: [self._shard(states.get(place), kind, layout) for states in self._ranks]
                for kind in sorted(self._kinds)
            },
            self._step,
        )

    def _shard(self, state: dict[str, Any] | None, kind: str, layout: ParamLayout) -> Tensor:
        """Zeros for a parameter that never had a gradient, as gpt_j_tied's second norm."""
        shape = in_memory(layout).shard_shape(len(self._ranks))
        value = (state or {}).get(kind)
        if value is None:
            return torch.zeros(shape)
        if isinstance(value, Quantized):
            value = value.cut(0, value.shape.numel()).view(value.shape)
        is_other = list(value.shape) != list(shape) and not layout.is_vocab
        if is_other or value.shape[1:] != torch.Size(shape)[1:]:
            raise CheckpointError(
                f"{self.folder}: its optimizer state has the shape {list(value.shape)} where the "
                f"configuration's parameter has {list(shape)}"
            )
        tensor: Tensor = value
        return tensor


def _is_kind(value: Any) -> bool:
    return isinstance(value, Quantized) or (isinstance(value, Tensor) and value.dim() > 0)


def _kept(file: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run needs of an mp_rank file besides the optimizer's state."""
    if missing := [counter for counter in COUNTERS if counter not in file]:
        raise KeyError(missing)
    return {
        key: value
        for key, value in file.items()
        if key not in _NOT_KEPT and "rng_" not in key  # upstream's random states
    }


def _by_place(
    checkpoint: Checkpoint, rank: int, files: list[dict[str, Any]]
) -> dict[Place, dict[str, Any]]:
    """The states that the stages of tp rank `rank` saved. Raises ValueError, KeyError and such."""
    found: dict[Place, dict[str, Any]] = {}
    if all(NUMBERED in file for file in files):
        numbered = [
            (tuple(place), file["optimizer"]["state"].get(number))
            for file in reversed(
                files
            )  # a tied embedding is the first stage's, equal to the last's
            for number, place in enumerate(file[NUMBERED])
        ]
        weights = [(i, name) for i in checkpoint.indices for name in _weights(checkpoint, i, rank)]
        if missing := set(weights) - {place for place, _ in numbered}:
            raise ValueError(missing)  # a file is
    else:
        numbered = _in_upstreams_order(checkpoint, rank, [file["optimizer"] for file in files])
    for place, state in numbered:
        if state:
            found[place] = moments(state)
    return found


def _weights(checkpoint: Checkpoint, index: int, rank: int) -> Mapping[str, Tensor]:
    return checkpoint.shards(index)[rank].tensors


def _in_upstreams_order(
    checkpoint: Checkpoint, rank: int, optimizers: list[dict[str, Any]]
) -> list[tuple[Place, dict[str, Any] | None]]:
    weights: list[tuple[Place, Tensor]] = [
        ((index, name), weight)
        for index in checkpoint.indices
        for name, weight in _weights(checkpoint, index, rank).items()
    ]
    groups = len(optimizers[0]["param_groups"])
    if groups > 1:  # upstream makes one group when nothing decays
        weights.sort(key=lambda item: item[1].dim() < 2)
    numbers = [
        [list(optimizer["param_groups"][group]["params"]) for optimizer in optimizers]
        for group in range(groups)
    ]
    # A tied embedding is on the last stage as well, before the stage's own layers.
    twins = sum(len(stage) for group in numbers for stage in group) - len(weights)
    if twins and len(optimizers) > 1:
        if twins != sum(place[0] == 0 for place, _ in weights):
            raise ValueError("more states than weights")
        del numbers[0][-1][:twins]
    states = [
        optimizer["state"].get(number)
        for group in numbers
        for optimizer, stage in zip(optimizers, group, strict=True)
        for number in stage
    ]
    return [(place, state) for (place, _), state in zip(weights, states, strict=True)]


def described(inner: Any, local: LocalLayers) -> dict[str, Any]:
    """What a checkpoint says of the optimizer state of DeepSpeed's engine `inner`.

    With equal descriptions and grids, one's files are the other's as they are.
    """
    optimizer = inner.optimizer.optimizer if inner.zero_optimization() else inner.optimizer
    of_it = {"optimizer_type": state_name(optimizer), "optimizer_bits": state_bits(optimizer)}
    if inner.zero_optimization():
        return of_it
    places = {
        parameter: [layer.file_index, name]
        for layer, module in local
        if layer.layout is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return of_it | {NUMBERED: [places[parameter] for parameter in parameters]}


def load_plain(
    inner: Any,
    folder: Path,
    read: Callable[[], SavedState],
    local: LocalLayers,
    groups: ProcessGroups,
) -> dict[str, Any]:
    """Fill the torch optimizer of DeepSpeed's engine `inner`; the client's state.

    `read` opens the state in `folder`. The weights are filled too where the state holds them, in
    more bits than the layer files do. Collective over the world. Raises CheckpointError.
    """

    def load() -> None:
        nonlocal model
        part = model_file(folder, groups.pp_rank * groups.tp + groups.tp_rank)
        if is_eight_bit(inner.optimizer) and part.is_file():
            model = load_model_file(part)
            if all(model.get(key) == value for key, value in described(inner, local).items()):
                # As it is: an 8-bit number that is made fp32 and 8-bit again may be another.
                inner.optimizer.load_state_dict(deepcopy(model["optimizer"]))
                return
        saved = read()
        model = saved.model
        _fill(inner.optimizer, saved, local, groups)

    model: dict[str, Any] = {}
    on_every_rank(groups, load)
    for counter in COUNTERS:
        setattr(inner, counter, model[counter])
    return model


def _fill(optimizer: Any, saved: SavedState, local: LocalLayers, groups: ProcessGroups) -> None:
    """This rank's parameters' state, and weights where it has them. Raises CheckpointError."""
    parameters = {
        parameter: (layer, name)  # a tied embedding is the same one in two layers
        for layer, module in local
        if layer.layout is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    for parameter, (layer, name) in parameters.items():
        layout = layer.trained[name]
        found = saved.of((layer.file_index, name), layout)
        check_state(optimizer, found.shards)
        values = {
            kind: reshard(shards, in_memory(layout), groups.tp_rank, groups.tp)
            for kind, shards in found.shards.items()
        }
        if (weight := values.pop("fp32", None)) is not None:
            with torch.no_grad():
                parameter.copy_(weight)
        if not values:
            continue
        state = {kind: value.to(parameter.device) for kind, value in values.items()}
        if found.step is not None:
            state["step"] = step_counter(optimizer, parameter, found.step)
        if is_eight_bit(optimizer):
            state = quantized(optimizer, parameter, state)
        optimizer.state[parameter] = state
