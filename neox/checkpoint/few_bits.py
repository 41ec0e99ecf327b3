"""Weights held in another form than their files: quantized or packed as they are read."""

from __future__ import annotations

from torch import Tensor, nn

from neox.checkpoint.sources import Shard
from neox.errors import CheckpointError
from neox.model.four_bit import FourBit, quantize_to_4
from neox.model.layout import ParamLayout
from neox.model.packed import Packed, pack
from neox.model.quantized import EightBit, cut, quantize
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups


def hold(
    place: nn.Module, name: str, layout: ParamLayout, stored: list[Shard], groups: ProcessGroups
) -> None:
    """Fill a weight of few bits: with the codes that are stored, or quantized. CheckpointError."""
    if isinstance(place, EightBit):
        if len(stored) == 1 and name in stored[0].eight_bit:
            whole = stored[0].eight_bit[name]
        else:
            whole = quantize(_cut(name, layout, stored, 0, 1))
        place.assign(cut(whole, layout, groups.tp_rank, groups.tp))
        return
    assert isinstance(place, FourBit | Packed), name
    mine = _cut(name, layout, stored, groups.tp_rank, groups.tp)
    try:
        if isinstance(place, FourBit):
            place.assign(quantize_to_4(mine))
        else:
            place.assign(pack(mine, place.bits))
    except ValueError as error:
        raise CheckpointError(f"{stored[0].where}: {name} {error}.") from error


def _cut(name: str, layout: ParamLayout, stored: list[Shard], rank: int, tp: int) -> Tensor:
    """What rank `rank` of `tp` holds of a tensor: the file's own memory where that is all of it."""
    shards = [shard.tensors[name] for shard in stored]
    if len(shards) == tp == 1 and shards[0].shape == layout.shape:
        return shards[0]
    return reshard(shards, layout, rank, tp)
