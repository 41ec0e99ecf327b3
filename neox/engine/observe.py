"""What a step did to every single parameter.

Norms are the whole model's whatever the grid: each element of a parameter, its gradient and its
optimizer state is counted by the one rank that is responsible for it (its tensor-parallel shard,
its pipeline stage, its part of ZeRO's partition), and one all-reduce adds the ranks up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad, safe_get_local_optimizer_state
from torch import Tensor, nn

from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.timers import StepTimers

GRADIENT, PARAMETER = "gradient", "parameter"


class Observation:
    """Attached to an engine for the whole training; free where nothing is asked for."""

    def __init__(self, engine: DeepSpeedEngine, config: NeoXConfig) -> None:
        self._config = config
        self._timers = StepTimers(engine) if config.wall_clock_breakdown else None
        wants_gradients = config.log_grad_norm or config.log_grad_pct_zeros
        self._norms = None
        if wants_gradients or config.log_param_norm or config.log_optimizer_states:
            self._norms = Norms(engine, gradients=wants_gradients)
        scaler = getattr(engine.inner.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # a run of overflows is told by us

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, drawn under a timer if there is one."""
        return self._timers.drawn(batches) if self._timers else batches

    def start(self) -> None:
        """A step begins."""
        if self._timers:
            self._timers.start()

    def timers(self) -> dict[str, float]:
        """Seconds that the parts of the step that just ended took on this rank."""
        return self._timers.read() if self._timers else {}

    def norms(self) -> dict[str, float]:
        """The norms after the step that just ended, by W&B's keys. Collective over the world.

        A parameter is called `{layer}.{name}`, as in the layer files; the state's number is its
        place among all parameters of the model. A gradient is what the optimizer was given: summed
        over the replicas, unscaled, not yet clipped.
        """
        if self._norms is None:
            return {}
        config, values = self._config, {}
        sums, names = self._norms.measure(states=config.log_optimizer_states), self._norms.names
        for kind, (squares, zeros, seen) in sums.items():
            for number, name in enumerate(names):
                if not seen[number]:
                    continue
                norm = squares[number] ** 0.5
                if kind == GRADIENT and config.log_grad_pct_zeros:
                    values[f"pct_grad_zeros/{name}"] = 100 * zeros[number] / seen[number]
                if kind == GRADIENT and config.log_grad_norm:
                    values[f"gradient_norms/{name}"] = norm
                if kind == PARAMETER and config.log_param_norm:
                    values[f"parameter_norms/{name}"] = norm
                if kind not in (GRADIENT, PARAMETER):
                    values[f"optimizer_state_norms/{number}_{kind}"] = norm
        return values


class Norms:
    """Sums over this rank's pieces of the model's parameters."""

    def __init__(self, engine: DeepSpeedEngine, *, gradients: bool) -> None:
        self._inner = engine.inner
        self._groups = engine.groups
        places = [
            (layer.index, name)
            for layer in engine.layers
            if layer.has_file
            for name in layer.trained
        ]
        self.names = [f"{index}.{name}" for index, name in places]
        numbers = {place: number for number, place in enumerate(places)}
        self._own: list[tuple[int, nn.Parameter]] = []
        for layer, module in engine.local:
            if not layer.has_file:
                continue
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                is_shard = layer.trained[name].dim is not None
                if is_shard or self._groups.tp_rank == 0:  # a replica counts once
                    self._own.append((numbers[layer.index, name], parameter))
        self._gradients: Tensor | None = None
        self._states: list[str] = []
        if gradients:
            self._watch_gradients()

    def _watch_gradients(self) -> None:
        """Read them when they are complete, and before clipping and the step use them up."""
        step = self._inner._take_model_step

        def observed(*args: Any, **kwargs: Any) -> Any:
            self._gradients = self._table(1)
            scale = float(self._inner.loss_scale()) if self._inner.fp16_enabled() else 1.0
            for number, parameter in self._own:
                piece = self._gradient(parameter)
                if piece is not None:
                    _add(self._gradients[0], number, piece, scale)
            return step(*args, **kwargs)

        self._inner._take_model_step = observed

    def measure(self, *, states: bool) -> dict[str, list[list[float]]]:
        """By kind: sums of squares, zeros and elements, for every parameter of the model.

        Collective over the world.
        """
        found = (
            {number: self._state(parameter) for number, parameter in self._own} if states else {}
        )
        if states and not self._states:  # the optimizer makes its state in its first step
            kinds = self._groups.gather({kind for state in found.values() for kind in state})
            self._states = sorted(set().union(*kinds))
        kinds = [GRADIENT, PARAMETER, *self._states]
        table = self._table(len(kinds))
        if self._gradients is not None:
            table[0], self._gradients = self._gradients[0], None
        for number, parameter in self._own:
            piece = self._weight(parameter)
            if piece is not None:
                _add(table[1], number, piece)
            for kind, piece in found.get(number, {}).items():
                _add(table[kinds.index(kind)], number, piece)
        if self._groups.world_size > 1:
            dist.all_reduce(table)
        return dict(zip(kinds, table.tolist(), strict=True))

    def _table(self, kinds: int) -> Tensor:
        return torch.zeros(
            kinds, 3, len(self.names), dtype=torch.float64, device=self._groups.device
        )

    def _weight(self, parameter: nn.Parameter) -> Tensor | None:
        if hasattr(parameter, "ds_id"):
            return self._without_padding(parameter, parameter.ds_tensor)
        return parameter if self._groups.dp_rank == 0 else None

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if hasattr(parameter, "ds_id"):
            return self._without_padding(parameter, safe_get_local_grad(parameter))
        if not hasattr(parameter, "_hp_mapping"):  # ZeRO 0: every replica has all of it
            return parameter.grad if self._groups.dp_rank == 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:  # another replica's
            return None
        piece = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        own = mapping.lp_fragment_address
        if piece.numel() == parameter.numel():  # bfloat16's sums are whole on every replica
            return piece.narrow(0, own.start, own.numel)
        return piece

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's piece of every kind of state that is real numbers."""
        if hasattr(parameter, "ds_id"):
            zero3 = parameter._z3_optimizer
            group, _, _ = zero3.grad_position[zero3.get_param_id(parameter)]
            kept = zero3.optimizer.state[zero3.fp32_partitioned_groups_flat[group]]
            state = {
                kind: self._without_padding(
                    parameter, safe_get_local_optimizer_state(parameter, kind)
                )
                for kind, value in kept.items()
                if isinstance(value, Tensor) and value.dim() > 0
            }
        elif not hasattr(parameter, "_hp_mapping"):
            state = self._inner.optimizer.state.get(parameter, {})
            state = state if self._groups.dp_rank == 0 else {}
        else:
            state = self._fragments(parameter._hp_mapping)
        return {
            kind: value
            for kind, value in state.items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.is_floating_point()
        }

    def _fragments(self, mapping: Any) -> dict[str, Tensor]:
        """ZeRO 1 and 2 keep the state of a whole group of parameters in one vector for each kind.

        DeepSpeed's own table of the pieces leaves out all groups but the first.
        """
        if mapping is None:
            return {}
        optimizer = self._inner.optimizer
        vectors = getattr(optimizer, "single_partition_of_fp32_groups", None)
        if vectors is None:  # its optimizer for bfloat16
            vectors = optimizer.fp32_groups_flat_partition
        whole, own = vectors[mapping.param_group_index], mapping.hp_fragment_address
        return {
            kind: value.narrow(0, own.start, own.numel)
            for kind, value in optimizer.optimizer.state.get(whole, {}).items()
            if isinstance(value, Tensor) and value.shape == whole.shape
        }

    def _without_padding(self, parameter: Any, piece: Tensor) -> Tensor:
        """ZeRO 3's partitions are of equal size: the last one is filled up."""
        before = self._groups.dp_rank * piece.numel()
        return piece.flatten()[: max(0, parameter.ds_numel - before)]


def _add(sums: Tensor, number: int, piece: Tensor, scale: float = 1.0) -> None:
    piece = piece.detach()
    norm = torch.linalg.vector_norm(piece, dtype=torch.float32).double() / scale
    sums[0, number] += norm.square()
    sums[1, number] += (piece == 0).sum()
    sums[2, number] += piece.numel()
