from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox.data.blend import open_blend, weights_of_counts
from neox.data.documents import open_documents
from neox.errors import DataError
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


@pytest.mark.parametrize(
    ("counts", "alpha", "expected"),
    [
        ([900, 100], 1.0, [0.9, 0.1]),  # what upstream's documentation promises; it gives 0.5, 0.5
        ([900, 100], 0.0, [0.5, 0.5]),
        ([900, 100], 0.5, [0.75, 0.25]),
        ([1, 3], 2.0, [0.1, 0.9]),
        ([7], 0.3, [1.0]),
        ([10**12, 10**12, 2 * 10**12], 1.0, [0.25, 0.25, 0.5]),
        ([2**31 - 1, 1], 300.0, [1.0, 0.0]),  # n ** 300 is no float
    ],
)
def test_weights_follow_document_counts(counts, alpha: float, expected) -> None:
    assert weights_of_counts(counts, alpha) == pytest.approx(expected, abs=1e-12)


def test_more_datasets_than_a_byte_can_count(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [900])
    write_dataset(tmp_path / "b", [900], first=1000)
    common, last = (open_documents(str(tmp_path / name)) for name in ("a", "b"))
    config = training_config(tmp_path)
    blend = open_blend([common] * 299 + [last], None, 900, config, ProcessGroups.single())
    from_last = [n for n in range(900) if blend[n].tokens_T[0] >= 1000]
    assert from_last == [299, 599, 899]


def test_too_many_datasets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [30])
    datasets = [open_documents(str(tmp_path / "a"))] * 2**15
    with pytest.raises(DataError, match="32768 datasets are too many to blend: merge some"):
        open_blend(datasets, None, 10, training_config(tmp_path), ProcessGroups.single())


def test_origins_are_those_of_the_dataset_drawn(tmp_path: Path) -> None:
    texts = {
        "a": write_dataset(tmp_path / "a", [5, 0, 90]),
        "b": write_dataset(tmp_path / "b", [40, 41, 3], first=1000),
    }
    config = training_config(tmp_path)
    datasets = [open_documents(str(tmp_path / name)) for name in texts]
    blend = open_blend(datasets, [1.0, 2.0], 60, config, ProcessGroups.single())
    for n in range(60):
        parts = [
            texts[Path(part.prefix).name][part.document][part.start : part.stop]
            for part in blend.origins(n)
        ]
        assert all(len(part) for part in parts)
        assert np.array_equal(np.concatenate(parts), blend[n].tokens_T)
