"""What a fine-tuning run trained, collected from the ranks that have its parts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from neox.checkpoint.peft import Adapters
from neox.engine.saved_state import Place, in_memory
from neox.model.gpt import Layer, LocalLayers
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups


def gathered_adapters(
    layers: Sequence[Layer], local: LocalLayers, groups: ProcessGroups
) -> Adapters:
    """Whole adapters, and what else was trained, of all `layers`, from each rank's `local` ones.

    Collective over the world; every rank gets them.
    """
    layouts = {layer.index: layer.trained for layer in layers}
    mine: dict[Place, Tensor] = {}
    if groups.dp_rank == 0:
        mine = {
            (layer.index, name): parameter.detach().cpu().clone()
            for layer, module in local
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
    frozen = layers[0].frozen
    assert frozen is not None
    return Adapters(frozen.specs, tensors)
