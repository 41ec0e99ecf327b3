"""ZeRO 3: saving weights that are spread over the replicas, and loading their optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, LOSS_SCALER, OPTIMIZER_STATE_DICT
from torch import Tensor

from neox.checkpoint.directory import on_every_rank
from neox.checkpoint.manifest import Entry
from neox.checkpoint.neox import save_layers
from neox.engine.eight_bit import is_eight_bit, quantized
from neox.engine.optimizers import check_state, step_counter
from neox.engine.plain_state import COUNTERS
from neox.engine.saved_state import SavedState, in_memory
from neox.model.gpt import LocalLayers
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups


def name_model_files(inner: Any, groups: ProcessGroups) -> None:
    """Call DeepSpeed's own state mp_rank_..., as without ZeRO 3, and not after each replica.

    Replicas but the first keep DeepSpeed's names for what they save, which is not written.
    """
    named = inner._get_ckpt_name

    def name(path: str, tag: str, mp_placeholder: str | None = None, **rest: Any) -> str:
        if mp_placeholder is None and groups.dp_rank > 0:
            return str(named(path, tag, mp_placeholder, **rest))
        part = f"{inner.checkpoint_mp_rank:02d}" if mp_placeholder is None else mp_placeholder
        return str(Path(path) / str(tag) / f"mp_rank_{part}_model_states.pt")

    inner._get_ckpt_name = name


def save_gathered(folder: Path, local: LocalLayers, groups: ProcessGroups) -> dict[str, Entry]:
    """`save_layers` on the first replica, one gathered layer at a time; nothing on the others.

    Collective over the data-parallel group; raises OSError once every layer is through.
    """
    written: dict[str, Entry] = {}
    failure: OSError | None = None
    for layer, module in local:
        if not layer.has_file:
            continue
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            if groups.dp_rank == 0 and failure is None:
                try:
                    written |= save_layers(folder, [(layer, module)], groups)
                except OSError as error:
                    failure = error
    if failure is not None:
        raise failure
    return written


def is_sharded(model_state: dict[str, Any]) -> bool:
    """Whether the run that wrote this mp_rank file had ZeRO 3."""
    zero = (model_state.get("ds_config") or {}).get("zero_optimization") or {}
    return bool(zero.get("stage") == 3)


def load_sharded(
    inner: Any, read: Callable[[], SavedState], local: LocalLayers, groups: ProcessGroups
) -> dict[str, Any]:
    """Fill the ZeRO 3 optimizer of DeepSpeed's engine `inner`; the client's state.

    `read` opens state of any grid and stage. The weights are filled too where the state holds them,
    in more bits than the layer files do. Collective over the world. Raises CheckpointError.
    """
    optimizer = inner.optimizer

    def state() -> None:
        nonlocal saved, loaded
        saved = read()
        loaded = optimizer.state_dict()
        loaded[OPTIMIZER_STATE_DICT]["state"], loaded[FP32_FLAT_GROUPS] = _shares(
            optimizer, saved, local, groups
        )
        if inner.fp16_enabled():
            kept = (LOSS_SCALER, "dynamic_loss_scale", "overflow")
            loaded |= {key: saved.shared[key] for key in kept if key in saved.shared}

    saved: Any = None
    loaded: dict[str, Any] = {}
    on_every_rank(groups, state)
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([loaded] * groups.dp)
    optimizer.checkpoint_event_epilogue()
    model: dict[str, Any] = saved.model
    for counter in COUNTERS:
        setattr(inner, counter, model[counter])
    return model


def _shares(
    optimizer: Any, saved: SavedState, local: LocalLayers, groups: ProcessGroups
) -> tuple[dict[int, dict[str, Any]], list[Tensor]]:
    """This rank's share of the state and of the weights in fp32, by DeepSpeed's vectors."""
    places = {
        parameter: (layer, name)  # a tied embedding is the same one in two layers
        for layer, module in local
        if layer.layout is not None
        for name, parameter in module.named_parameters()
    }
    states: dict[int, dict[str, Any]] = {}
    weights = []
    vectors = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for number, (parameters, flat) in enumerate(vectors):
        state: dict[str, Any] = {}
        start = 0
        for parameter in parameters:
            layer, name = places[parameter]
            layout = layer.layout[name]
            found = saved.of((layer.file_index, name), layout)
            check_state(optimizer.optimizer, found.shards)
            share = math.ceil(parameter.ds_numel / groups.dp)
            for kind, shards in found.shards.items():
                value = reshard(shards, in_memory(layout), groups.tp_rank, groups.tp).flatten()
                value = value[groups.dp_rank * share :][:share]
                if kind not in state:
                    state[kind] = torch.zeros_like(flat, requires_grad=False)
                state[kind][start : start + len(value)] = value
            if found.step is not None and found.shards.keys() - {"fp32"}:
                state["step"] = step_counter(optimizer.optimizer, flat, found.step)
            start += share
        weights.append(state.pop("fp32", flat.detach()))
        if state and is_eight_bit(optimizer.optimizer):
            state = quantized(optimizer.optimizer, flat, state)
        if state:
            states[number] = state
    return states, weights
