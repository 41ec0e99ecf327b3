"""The learning rate's curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.train.schedule import decay_iterations, learning_rate, rate_reported, rate_used

STYLES = ["constant", "linear", "cosine", "exponential", "wsd"]


@pytest.mark.parametrize("style", STYLES)
def test_warmup_rises_in_equal_steps_to_the_peak(make_config, style):
    config = make_config(lr_decay_style=style, warmup=0.2)
    rates = [learning_rate(config, step) for step in range(1, 5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])


def test_an_iteration_uses_the_rate_that_the_one_before_reported(make_config):
    config = make_config()
    for iteration in range(2, 30):
        assert rate_used(config, iteration) == rate_reported(config, iteration - 1)
    assert rate_used(config, 1) == rate_reported(config, 1) > 0  # the first has none before it


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
def test_the_rate_stays_at_min_lr_after_the_decay(make_config, style):
    config = make_config(lr_decay_style=style, train_iters=100, lr_decay_iters=20)
    assert learning_rate(config, 18) > 1e-4
    assert {learning_rate(config, step) for step in range(20, 101)} == {1e-4}


@pytest.mark.parametrize("style", STYLES)
def test_the_rate_never_rises_after_warmup_nor_leaves_its_bounds(make_config, style):
    config = make_config(lr_decay_style=style, warmup=0.17, train_iters=400, lr_decay_iters=100)
    rates = [learning_rate(config, step) for step in range(18, 401)]
    assert rates == sorted(rates, reverse=True)
    assert max(rates) <= 1e-3
    assert min(rates) >= 1e-4


def test_exponential_halves_over_the_decay(make_config):
    config = make_config(lr_decay_style="exponential", warmup=0.0)
    assert learning_rate(config, 20) == pytest.approx(0.5e-3, rel=1e-3)
    assert learning_rate(config, 40) == pytest.approx(0.25e-3, rel=1e-3)
    assert learning_rate(config, 1000) == 1e-4


@pytest.mark.parametrize(
    ("style", "halfway"),
    [("linear", 0.5), ("cosine", 0.5), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_keeps_the_peak_and_falls_in_the_end(make_config, style, halfway):
    config = make_config(
        lr_decay_style="WSD",
        wsd_decay_style=style,
        wsd_decay_ratio=0.2,
        train_iters=150,
        lr_decay_iters=100,
        warmup=0.1,
    )
    rates = {step: learning_rate(config, step) for step in range(1, 151)}
    assert [rates[step] for step in range(1, 11)] == pytest.approx([i * 1e-4 for i in range(1, 11)])
    assert {rates[step] for step in range(10, 81)} == {1e-3}
    assert rates[81] < 1e-3
    assert rates[90] == pytest.approx(1e-4 + 9e-4 * halfway)
    quarter = {"linear": 0.75, "cosine": (1 + 0.5**0.5) / 2, "minus_sqrt": 0.5}[style]
    assert rates[85] == pytest.approx(1e-4 + 9e-4 * quarter)
    assert {rates[step] for step in range(100, 151)} == {1e-4}


def test_wsds_stable_phase_does_not_depend_on_where_it_ends(make_config):
    short, long = (
        make_config(lr_decay_style="wsd", train_iters=iters, warmup=10 / iters, wsd_decay_ratio=0.1)
        for iters in (100, 1000)
    )
    assert [learning_rate(short, i) for i in range(90)] == [
        learning_rate(long, i) for i in range(90)
    ]


def test_a_warmup_shorter_than_one_step_does_not_overshoot(make_config):
    config = make_config(warmup=0.01)  # 0.2 steps
    assert all(learning_rate(config, step) <= 1e-3 for step in range(21))


@pytest.mark.parametrize("style", STYLES[:-1])
def test_warmup_may_take_the_whole_decay(make_config, style):
    config = make_config(lr_decay_style=style, warmup=1.0)
    assert learning_rate(config, 20) == 1e-3
    assert 1e-4 <= learning_rate(config, 21) <= 1e-3


def test_the_decay_ends_at_its_own_iteration_or_fraction_or_with_training(make_config):
    assert decay_iterations(make_config()) == 20
    assert decay_iterations(make_config(lr_decay_fraction=0.77)) == 15
    assert decay_iterations(make_config(lr_decay_iters=7)) == 7
    assert decay_iterations(make_config(lr_decay_fraction=0.01)) == 1


def test_the_documents_table_is_the_curve(make_config):
    page = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
    table = page[page.index("| `lr_decay_style` | 1 |") :].partition("\n\n")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")
    ]
    assert len(rows) == 7
    for style, *rates in rows:
        kind, _, fall = style.replace("`", "").partition(", ")
        values = {"optimizer": {"params": {"lr": 1.0}}, "min_lr": 0.1, "lr_decay_iters": 100}
        config = make_config(**values, lr_decay_style=kind, wsd_decay_style=fall or "cosine")
        assert rates == [f"{learning_rate(config, int(step)):.3f}" for step in head[1:]], style
