"""What a rank's page says of its collectives."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from neox import progress
from neox.parallel import watched
from neox.parallel.topology import Topology
from tests.world import World


def communicate(rank: int) -> list[tuple[str, int, int, bool]]:
    """The page after each of some collectives of a grid of tp 2 and dp 2."""
    watched.install(Topology(1, 2, 2), 3600.0)
    pair = [0, 1] if rank < 2 else [2, 3]
    tp = dist.new_group([0, 1])
    other = dist.new_group([2, 3])
    tp = tp if rank < 2 else other
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    said = []

    def note() -> None:
        at = progress.page().read()
        said.append((at.call, at.number, at.size, at.waiting))

    x = torch.ones(6)
    dist.all_reduce(x, group=tp)
    note()
    dist.all_reduce(x, dist.ReduceOp.SUM, tp)
    note()
    dist.broadcast(x, rank % 2, group=across)
    note()
    dist.barrier()
    note()
    if rank == pair[0]:
        dist.send(x, pair[1], group=tp)
    else:
        dist.recv(x, src=pair[0], group=tp)
    note()
    assert tp._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=1)
    return said


def test_each_collective_is_noted_with_its_group_number_and_bytes(world: World) -> None:
    for rank, said in enumerate(world.run(4, communicate)):
        assert said[:4] == [
            ("all_reduce of tp", 1, 24, False),
            ("all_reduce of tp", 2, 24, False),
            ("broadcast of dp", 1, 24, False),
            ("barrier of all ranks", 1, 0, False),
        ]
        way = f"recv from rank {rank - 1}" if rank % 2 else f"send to rank {rank + 1}"
        assert said[4] == (way, 3, 24, False)


def test_who_waits_says_for_what(world: World) -> None:
    assert world.run(2, wait)[0] == ("all_reduce of all ranks", True)


def wait(rank: int) -> tuple[str, bool]:
    """Rank 0 waits in a collective that rank 1 joins once it has seen that."""
    watched.install(Topology(1, 1, 2), 3600.0)
    if rank == 0:
        import threading

        thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(1),))
        thread.start()
        while not (at := progress.page().read()).waiting:
            pass
        dist_store().set("seen", "1")
        thread.join()
        return at.call, at.waiting
    dist_store().wait(["seen"])
    dist.all_reduce(torch.ones(1))
    return "", False


def dist_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
