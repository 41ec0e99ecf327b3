"""When a run saves: NeoX's keys for it, with the examples of its documentation."""

from __future__ import annotations

from typing import Any

import pytest

from neox.train.cadence import is_save_iteration
from tests.models import config_of


def saves(train_iters: int, **values: Any) -> list[int]:
    values = {"save": "x", "train_iters": train_iters, "lr_decay_iters": train_iters, **values}
    config = config_of(**values)
    return [i for i in range(train_iters + 1) if is_save_iteration(config, i)]


def test_every_so_many_iterations() -> None:
    assert saves(100, checkpoint_factor=20) == [20, 40, 60, 80, 100]
    assert saves(10, checkpoint_factor=4) == [4, 8, 10]
    assert saves(10, checkpoint_factor=40) == [10]


def test_at_powers() -> None:
    log = {"checkpoint_scale": "log"}
    assert saves(100, checkpoint_factor=2, **log) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert saves(1000, checkpoint_factor=10, **log) == [1, 10, 100, 1000]
    # 1.5, 2.25, 3.4, 5.06, 7.6, 11.4: rounded down, and each once
    assert saves(12, checkpoint_factor=1.5, **log) == [1, 2, 3, 5, 7, 11, 12]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_extra_iterations_join_the_others(scale: str) -> None:
    plain = saves(20, checkpoint_factor=3, checkpoint_scale=scale)
    extra = saves(
        20, checkpoint_factor=3, checkpoint_scale=scale, extra_save_iters=[11, 0, 3, 11, 50]
    )
    assert extra == sorted({*plain, 0, 3, 11})


def test_extra_iterations_alone() -> None:
    assert saves(10, extra_save_iters=[3]) == [3, 10]
    assert saves(10, extra_save_iters=[0]) == [0, 10]


def test_nothing_is_saved_without_a_place() -> None:
    assert saves(10, save=None, checkpoint_factor=2) == []
