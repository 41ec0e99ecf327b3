"""The ranks of tests themselves: what goes wrong must be reported, and cost nobody else."""

from __future__ import annotations

import gc
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from neox.errors import ConfigError
from tests.world import PRELOADED, RankError, World


def total(rank: int, scale: float) -> torch.Tensor:
    value = torch.full((2,), scale * (rank + 1))
    dist.all_reduce(value)
    return value


def pid_and_size(rank: int) -> tuple[int, int, int]:
    return os.getpid(), dist.get_world_size(), torch.get_num_threads()


def preloaded(rank: int) -> bool:
    return PRELOADED in sys.modules and gc.get_freeze_count() > 100_000


def refuse_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ConfigError("num_layers is 3")
    total(rank, 1.0)


class Unpicklable(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(detail)


def raise_unpicklable(rank: int) -> None:
    raise Unpicklable(1, detail="the detail")


def return_unpicklable(rank: int) -> object:
    return lambda: None


def hang_on_rank_1(rank: int) -> int:
    while rank == 1:
        time.sleep(0.01)
    return rank


def ignore_failure_of_rank_0(rank: int) -> None:
    if rank == 0:
        raise ValueError("first")
    hang_on_rank_1(1)


def leave(rank: int) -> None:
    if rank == 1:
        sys.exit(3)
    total(rank, 1.0)


def die(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    total(rank, 1.0)


def parallel_state(rank: int, tp: int) -> int:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp)
    return parallel_state.get_tensor_model_parallel_world_size()


def assert_whole(world: World) -> None:
    results = world.run(2, total, 2.0)
    assert all(torch.equal(result, torch.full((2,), 6.0)) for result in results)


def test_results_come_in_rank_order_from_a_group_of_the_size_asked_for(world: World) -> None:
    for n in (1, 3, 2):
        expected = torch.full((2,), 0.5 * n * (n + 1) / 2)
        assert all(torch.equal(result, expected) for result in world.run(n, total, 0.5))
        assert [answer[1:] for answer in world.run(n, pid_and_size)] == [(n, 1)] * n


def test_ranks_of_one_call_are_not_those_of_another(world: World) -> None:
    first, second = (world.run(2, pid_and_size) for _ in range(2))
    assert len({pid for pid, _, _ in first + second}) == 4


def test_a_rank_has_the_libraries_from_its_start(world: World) -> None:
    assert world.run(1, preloaded) == [True]  # a failed import would only be slow


def test_an_exception_comes_back_with_its_type_and_the_rank_and_traceback(world: World) -> None:
    assert_whole(world)  # its libraries are loaded before the clock starts
    started = time.monotonic()
    with pytest.raises(ConfigError, match="num_layers is 3") as caught:
        world.run(2, refuse_on_rank_1)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert "in refuse_on_rank_1" in str(caught.value.__cause__)
    assert time.monotonic() - started < 20
    assert_whole(world)


def test_what_cannot_be_pickled_is_shown_as_text(world: World) -> None:
    with pytest.raises(RankError, match="the detail"):
        world.run(1, raise_unpicklable)
    with pytest.raises(Exception, match="return_unpicklable"):
        world.run(1, return_unpicklable)


def test_a_hung_rank_is_named_with_its_stack_and_ended(world: World) -> None:
    with pytest.raises(RankError, match=r"not done after 15 s: rank 1 of 2\nrank 1:") as caught:
        world.run(2, hang_on_rank_1, timeout=15.0)  # rank 0 must be done by then
    assert "in hang_on_rank_1" in str(caught.value)
    assert_whole(world)


def test_a_failure_does_not_wait_for_ranks_that_hang_because_of_it(world: World) -> None:
    assert_whole(world)  # its libraries are loaded before the clock starts
    started = time.monotonic()
    with pytest.raises(ValueError, match="first"):
        world.run(2, ignore_failure_of_rank_0)
    assert time.monotonic() - started < 20
    assert_whole(world)


@pytest.mark.parametrize(
    ("function", "message"), [(leave, "SystemExit: 3"), (die, "rank 1 died.* 7")]
)
def test_a_rank_that_leaves_is_named(world: World, function, message: str) -> None:
    with pytest.raises(RankError, match=message):
        world.run(2, function)
    assert_whole(world)


def test_model_parallel_groups_do_not_outlive_a_call(world: World) -> None:
    assert world.run(2, parallel_state, 2) == [2, 2]
    assert world.run(2, parallel_state, 1) == [1, 1]
