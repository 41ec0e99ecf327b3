from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox.data.blend import open_blend
from neox.data.documents import open_documents
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import naive_order, training_config, write_dataset


def read_blend(folder: Path, names: list[str], weights, num_samples: int) -> np.ndarray:
    config = training_config(folder)
    datasets = [open_documents(str(folder / name)) for name in names]
    blend = open_blend(datasets, weights, num_samples, config, ProcessGroups.single())
    assert len(blend) == num_samples
    return np.stack([blend[n].tokens_T for n in range(num_samples)])


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.2, 0.8], [5.0, 5.0], None])
def test_every_prefix_follows_the_weights(tmp_path: Path, weights) -> None:
    a = write_dataset(tmp_path / "a", [300, 300])
    b = write_dataset(tmp_path / "b", [200, 500], first=1000)
    blended = read_blend(tmp_path, ["a", "b"], weights, 100)

    from_a = blended[:, 0] < 1000
    share = 0.5 if weights is None else weights[0] / sum(weights)
    ideal = np.arange(1, 101) * share
    assert np.abs(np.cumsum(from_a) - ideal).max() <= 1  # greedy: never off by more than a sample
    # Within one dataset, its samples come in its own order.
    wanted = [int(np.ceil(100 * s * 1.005)) for s in (share, 1 - share)]
    assert np.array_equal(blended[from_a], naive_order(a, 0, 2, wanted[0], 8, 7)[: from_a.sum()])
    assert np.array_equal(
        blended[~from_a], naive_order(b, 0, 2, wanted[1], 8, 7)[: (~from_a).sum()]
    )


def test_order_of_datasets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [900])
    write_dataset(tmp_path / "b", [900], first=1000)
    write_dataset(tmp_path / "c", [900], first=2000)
    blended = read_blend(tmp_path, ["a", "b", "c"], [0.5, 0.25, 0.25], 9)
    # Each from the one furthest behind its weight; the first of equals.
    assert (blended[:, 0] // 1000).tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 0]


def test_small_datasets_repeat(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [20])
    write_dataset(tmp_path / "b", [20], first=1000)
    blended = read_blend(tmp_path, ["a", "b"], [3.0, 1.0], 40)
    assert (blended[:, 0] < 1000).sum() == 30


def test_a_change_of_weights_is_seen(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [900])
    write_dataset(tmp_path / "b", [900], first=1000)
    shares = [
        (read_blend(tmp_path, ["a", "b"], weights, 40)[:, 0] < 1000).sum()
        for weights in ([1.0, 1.0], [3.0, 1.0])
    ]
    assert shares == [20, 30]
