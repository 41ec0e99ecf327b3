"""What a fine-tuning run trained, collected from the ranks that have its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from neox.checkpoint.peft import Adapters
from neox.engine.saved_state import Place, in_memory
from neox.model.shard import reshard

if TYPE_CHECKING:
    from neox.engine.deepspeed import DeepSpeedEngine


def gathered_adapters(engine: DeepSpeedEngine) -> Adapters:
    """The whole adapters, and what else was trained, of every layer; in fact on rank 0 only.

    Collective over the world.
    """
    groups, layouts = engine.groups, {layer.index: layer.trained for layer in engine.layers}
    mine: dict[Place, Tensor] = {}
    if groups.dp_rank == 0:
        mine = {
            (layer.index, name): parameter.detach().cpu().clone()
            for layer, module in engine.local
            if layer.has_file
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
    ranks = groups.gather((groups.tp_rank, mine))
    shards: dict[Place, dict[int, Tensor]] = {}
    for tp_rank, part in ranks:
        for place, tensor in part.items():
            shards.setdefault(place, {})[tp_rank] = tensor
    tensors = {}
    for (index, name), parts in sorted(shards.items()):
        layout = in_memory(layouts[index][name])
        tensors[index, name] = reshard([parts[rank] for rank in sorted(parts)], layout, 0, 1)
    frozen = engine.layers[0].frozen
    assert frozen is not None
    return Adapters(frozen.specs, tensors)
