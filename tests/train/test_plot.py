"""tools/plot.py: what is drawn, and what is said about files that cannot be."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plot"]


def _write_run(folder: Path, losses: list[float | None], every: int = 0) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for iteration, loss in enumerate(losses, start=1):
        rows.append({"iteration": iteration, "train/lm_loss": loss, "train/learning_rate": 1e-3})
        rows[-1] |= {"time": 1e9 + 1800 * iteration, "tokens": 4096 * iteration}
        rows[-1] |= {f"gradient_norms/{name}": 0.5 for name in ("2.dense", "3.dense", "3.norm")}
        if every and iteration % every == 0:
            rows[-1]["validation/lm_loss"] = loss
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_a_png(tmp_path):
    _write_run(tmp_path / "run", [7.0, 6.5, 6.0])
    output = tmp_path / "figures" / "loss.png"
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "run", "-o", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    assert str(output) in done.stdout


def test_each_run_has_a_training_line_and_its_validation_dots(plot, tmp_path, monkeypatch):
    _write_run(tmp_path / "small", [7.0, None, 6.0, 5.5], every=2)
    _write_run(tmp_path / "large", [7.0, 5.0])
    monkeypatch.chdir(tmp_path)
    runs = [plot.load_run(Path("small")), plot.load_run(Path("large/metrics.jsonl"))]
    figure = plot.draw(runs, ["train/lm_loss"])
    (axes,) = figure.axes
    train, validation, large = axes.lines
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["small, train", "small, validation", "large, train"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    assert list(train.get_xdata()) == [1, 2, 3, 4]
    assert math.isnan(train.get_ydata()[1])  # null: a gap
    assert list(validation.get_xdata()) == [2, 4]
    assert train.get_color() == validation.get_color() != large.get_color()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "loss (nats per token)")


def test_any_key_can_be_drawn(plot, tmp_path):
    path = _write_run(tmp_path / "run", [7.0, 6.0])
    (axes,) = plot.draw([plot.load_run(path)], ["train/learning_rate"]).axes
    assert axes.get_ylabel() == "learning rate"
    assert list(axes.lines[0].get_ydata()) == [1e-3, 1e-3]


def test_every_pattern_has_a_chart_and_every_match_a_line(plot, tmp_path):
    run = plot.load_run(_write_run(tmp_path / "run", [7.0, 6.0]))
    loss, norms = plot.draw([run], ["train/lm_loss", "gradient_norms/*dense"]).axes
    assert len(loss.lines) == 1
    labels = [line.get_label() for line in norms.lines]
    assert labels == [f"{tmp_path}/run, gradient_norms/{n}.dense" for n in (2, 3)]


def test_the_axes_are_iterations_hours_or_tokens_and_may_be_logarithmic(plot, tmp_path):
    run = plot.load_run(_write_run(tmp_path / "run", [7.0, 6.0, 5.0], every=3))
    (axes,) = plot.draw([run], ["train/lm_loss"], x="time", log="y").axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.0, 0.5, 1.0], [1.0]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert axes.get_xlabel() == "hours since the start"
    (axes,) = plot.draw([run], ["train/lm_loss"], x="tokens", log="x").axes
    assert list(axes.lines[0].get_xdata()) == [4096, 8192, 12288]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_smoothing_is_an_unbiased_average_beside_what_was_measured(plot, tmp_path):
    assert plot.smoothed([3.0, 3.0, math.nan, 3.0], 0.9)[::3] == pytest.approx([3.0, 3.0])
    assert plot.smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
    assert math.isnan(plot.smoothed([1.0, math.nan], 0.9)[1])
    run = plot.load_run(_write_run(tmp_path / "run", [7.0, 6.0]))
    (axes,) = plot.draw([run], ["train/lm_loss"], smooth=0.5).axes
    smooth, raw = axes.lines
    assert list(raw.get_ydata()) == [7.0, 6.0]
    assert list(smooth.get_ydata()) == pytest.approx([7.0, (0.5 * 7 + 6) / 1.5])


def test_the_ending_says_the_format(plot, tmp_path):
    run = _write_run(tmp_path / "run", [7.0, 6.0])
    assert plot.main([str(run), "-o", str(tmp_path / "x.svg"), "--smooth", "0.9"]) == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "does not exist; training writes it into the run's log_dir"),
        ("", [], "is empty: no iteration has been logged yet"),
        (
            '{"iteration": 1, "a": 2}\nrubbish\n',
            [],
            'line 2 is not a JSON object with a number "it',
        ),
        ("[1]\n", [], "line 1 is not a JSON object"),
        ('{"iteration": 1, "a/b": 2}\n', [], "has no 'train/lm_loss'; it has a/b"),
        ('{"iteration": 1, "a/b": 2}\n', ["--key", "a/b", "--x", "time"], "has no 'time' at iter"),
        ('{"iteration": 1, "a/b": 2}\n', ["--key", "a/b", "-o", "x.xyz"], "x.xyz: Format 'xyz' is"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_named(
    plot, tmp_path, monkeypatch, capsys, content, arguments, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("metrics.jsonl").write_text(content)
    assert plot.main(["metrics.jsonl", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed
