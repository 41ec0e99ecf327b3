"""Process groups, made once from a topology and passed to whoever communicates."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from neox.parallel.topology import Topology

# Long enough for a slow rank to load a big checkpoint, short enough to end a job that hangs.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the grid and its groups (None in a single process)."""

    topology: Topology
    rank: int
    device: torch.device
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None  # the tp x pp ranks that hold one model

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ProcessGroups:
        """One process on its own: nothing of torch.distributed is started or needed."""
        return cls(Topology(), 0, torch.device(device))

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def tp(self) -> int:
        return self.topology.tp

    @property
    def pp(self) -> int:
        return self.topology.pp

    @property
    def dp(self) -> int:
        return self.topology.dp

    @property
    def tp_rank(self) -> int:
        return self.topology.coordinate(self.rank).tp

    @property
    def pp_rank(self) -> int:
        return self.topology.coordinate(self.rank).pp

    @property
    def dp_rank(self) -> int:
        return self.topology.coordinate(self.rank).dp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def stage_rank(self, pp: int) -> int:
        """The global rank at pipeline stage `pp` with this rank's dp and tp indices."""
        at = self.topology.coordinate(self.rank)
        return self.topology.rank(pp, at.dp, at.tp)

    def barrier(self) -> None:
        """Wait for every rank. Collective over the world; nothing in one process."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Every rank's small, picklable `value`, by rank. Collective over the world."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values


def connect(backend: str) -> None:
    """Start torch.distributed from the environment unless it is. Collective over the world."""
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)


def initialize(topology: Topology, backend: str, device: torch.device) -> ProcessGroups:
    """Make the groups of `topology`. Collective over the world.

    torch.distributed is started from the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
    unless the caller has started it. With tp > 1 megatron-core's parallel state is set up too,
    since its layers and loss look their group up there.
    """
    if topology.world_size == 1 and not dist.is_initialized():
        return ProcessGroups(topology, 0, device)
    connect(backend)
    rank = dist.get_rank()
    assert dist.get_world_size() == topology.world_size, (dist.get_world_size(), topology)

    if topology.tp > 1:
        from neox.parallel import megatron

        tp_group = megatron.initialize(topology)
    else:
        tp_group = None
    return ProcessGroups(
        topology=topology,
        rank=rank,
        device=device,
        tp_group=tp_group,
        pp_group=_own_group(topology.groups("pp"), rank),
        dp_group=_own_group(topology.groups("dp"), rank),
        replica_group=_own_group(topology.groups("pp", "tp"), rank),
    )


def shutdown(groups: ProcessGroups) -> None:
    """Leave torch.distributed. Safe on a rank whose peers are already gone."""
    if not dist.is_initialized():
        return
    if groups.tp > 1:
        from neox.parallel import megatron

        megatron.shutdown()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Create every group (each rank must take part in each creation); return this rank's own."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    return own
