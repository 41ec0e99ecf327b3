"""Adam's state as upstream saves it without ZeRO: in the mp_rank files, by parameter number.

A stage numbers its parameters in the order of its layers, those that decay before those that don't
(neox.engine.optimizers). So over all stages, each group has the parameters of the whole model in
order, and where one stage ends need not be known.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import load_model_file, model_file
from neox.engine.saved_state import ParameterState, Place
from neox.errors import CheckpointError
from neox.model.layout import ParamLayout

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size")


class PlainState:
    """A SavedState of the moments alone: the weights are the layer files'. CheckpointError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.shared: dict[str, Any] = {}
        self._ranks: list[dict[Place, dict[str, Any]]] = []
        folder, tp = checkpoint.folder, checkpoint.tp
        stages = len(list(folder.glob("mp_rank_*_model_states.pt"))) // tp
        for rank in range(tp):
            files = [load_model_file(model_file(folder, s * tp + rank)) for s in range(stages)]
            try:
                self.model = {counter: files[0][counter] for counter in _COUNTERS}
                self._ranks.append(_by_place(checkpoint, rank, [f["optimizer"] for f in files]))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                raise CheckpointError(
                    f"{folder}: the optimizer state in {model_file(folder, rank).name} does not go "
                    "with the weights"
                ) from error
        self.model["optimizer_type"] = "adam"
        # DeepSpeed's FusedAdam counts the steps of a group at its last parameter only.
        self._step = max(
            float(state.get("step", 0)) for states in self._ranks for state in states.values()
        )

    def of(self, place: Place, layout: ParamLayout) -> ParameterState:
        return ParameterState(
            {moment: [states[place][moment] for states in self._ranks] for moment in _MOMENTS},
            self._step,
        )


def _by_place(
    checkpoint: Checkpoint, rank: int, optimizers: list[dict[str, Any]]
) -> dict[Place, dict[str, Any]]:
    """The states that the stages of tp rank `rank` saved. Raises ValueError, KeyError and such."""
    weights: list[tuple[Place, Tensor]] = [
        ((index, name), weight)
        for index in checkpoint.indices
        for name, weight in checkpoint.shards(index)[rank].tensors.items()
    ]
    groups = len(optimizers[0]["param_groups"])
    if groups > 1:  # upstream makes one group when nothing decays
        weights.sort(key=lambda item: item[1].dim() < 2)
    states = [
        # No state is there of a parameter that never had a gradient, as gpt_j_tied's second norm.
        optimizer["state"].get(number)
        for group in range(groups)
        for optimizer in optimizers
        for number in optimizer["param_groups"][group]["params"]
    ]
    found = {
        place: state
        for (place, weight), state in zip(weights, states, strict=True)
        if state is not None
    }
    for place, weight in weights:
        if place in found and any(found[place][m].shape != weight.shape for m in _MOMENTS):
            raise ValueError(place)
    return found
