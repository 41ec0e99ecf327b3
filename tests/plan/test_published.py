"""Published runs are predicted, with rates that other published runs were taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_runs import (
    TOLERANCE,
    Row,
    error,
    fit,
    predict,
    print_table,
    read_rows,
    with_rates,
)
from neox.config import load_config
from neox.model.layout import pad_vocab_size
from neox.parallel.topology import Topology
from neox.plan.cluster import CALIBRATED, load_cluster
from neox.plan.messages import work
from neox.plan.stages import PlannedModel
from neox.plan.time import step_time
from neox.plan.trace import planned_world
from neox.plan.traffic import shape_of

ROWS = read_rows()
CHECKED = [row for row in ROWS if row.use == "check"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_a_row_that_was_not_fitted_is_predicted(row: Row) -> None:
    assert abs(error(row)) < TOLERANCE


def test_enough_rows_check() -> None:
    table = [row for row in CHECKED if row.source == "megatron_table_1"]
    assert len(table) >= 5
    assert "GPT-NeoX-20B" in {row.name for row in CHECKED}


def test_the_fit_gives_the_constants() -> None:
    found = fit(ROWS)
    for name in ("products", "memory", "links"):
        assert getattr(found, name) == pytest.approx(getattr(CALIBRATED, name), abs=2e-3)


def test_neox_20b_took_what_its_hours_say() -> None:
    """117 TFLOP/s by the formula of its time are 1830 hours for 150000 steps."""
    row = next(row for row in ROWS if row.name == "GPT-NeoX-20B")
    assert row.seconds * 150_000 / 3600 == pytest.approx(1830, rel=0.01)


def test_the_documented_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS, CALIBRATED)
    assert capsys.readouterr().out in (CONFIGS.parent / "docs" / "clusters.md").read_text()


def test_parts_add_up() -> None:
    for row in ROWS:
        step = predict(row, with_rates(row, CALIBRATED))
        assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_the_shipped_20b_is_predicted_too() -> None:
    """From the configuration, as a plan does it. It is quicker than GPT-NeoX was, which wrote
    attention's scores to memory; by arithmetic alone it cannot be quicker than its products."""
    config = load_config([CONFIGS / "20B.yml"], purpose="train", world_size=96, check_files=False)
    vocab = pad_vocab_size(50257, config.make_vocab_size_divisible_by, config.model_parallel_size)
    with planned_world():
        planned = work(PlannedModel(config, vocab))
    assert planned.topology == Topology(pp=4, dp=12, tp=2)
    cluster = load_cluster("a100-40gb")
    step = step_time(planned, shape_of(config, vocab), cluster)
    row = next(row for row in ROWS if row.name == "GPT-NeoX-20B")
    products = sum(planned.flops.values()) / 96 / cluster.peak["float16"]
    assert products < step.seconds < row.seconds
