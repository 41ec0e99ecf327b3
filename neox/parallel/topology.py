"""Where a rank stands in the grid of pipeline, data and tensor parallelism: arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Axis = Literal["pp", "dp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "tp")


class Coordinate(NamedTuple):
    """A rank's index on each axis."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """A grid of `pp * dp * tp` ranks.

    Tensor parallelism varies fastest, then data, then pipeline, so that the most talkative ranks
    are neighbours: rank = (pp_index * dp + dp_index) * tp + tp_index. This is the order of
    DeepSpeed's PipeModelDataParallelTopology and of megatron-core's 'tp-cp-ep-dp-pp'.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        assert min(self.pp, self.dp, self.tp) >= 1, self

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    def coordinate(self, rank: int) -> Coordinate:
        assert 0 <= rank < self.world_size, f"rank {rank} is outside {self}"
        pipe_and_data, tp = divmod(rank, self.tp)
        pp, dp = divmod(pipe_and_data, self.dp)
        return Coordinate(pp, dp, tp)

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, *axes: Axis) -> list[list[int]]:
        """The sets of ranks that differ only along `axes`, each in rank order.

        groups("tp") are the tensor-parallel groups; groups("pp", "tp") are the replicas: all the
        ranks that together hold one model.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinate(rank)
            key = tuple(getattr(at, axis) for axis in AXES if axis not in axes)
            found.setdefault(key, []).append(rank)
        return list(found.values())
