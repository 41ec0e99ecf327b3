from __future__ import annotations

import itertools

import pytest

from neox.parallel.topology import Topology


@pytest.mark.parametrize("sizes", itertools.product((1, 2, 3), repeat=3))
def test_rank_and_coordinate_are_inverse(sizes: tuple[int, int, int]) -> None:
    topology = Topology(*sizes)
    for rank in range(topology.world_size):
        assert topology.rank(*topology.coordinate(rank)) == rank


def test_tp_neighbours_are_adjacent_and_stages_farthest() -> None:
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups("pp", "tp") == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_order_is_deepspeeds() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    ours = Topology(pp=2, dp=3, tp=2)
    theirs = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    for rank in range(ours.world_size):
        at = theirs.get_coord(rank)
        assert ours.coordinate(rank) == (at.pipe, at.data, at.model)
