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
    figure = plot.draw(runs, "train/lm_loss")
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
    (axes,) = plot.draw([plot.load_run(path)], "train/learning_rate").axes
    assert axes.get_ylabel() == "learning rate"
    assert list(axes.lines[0].get_ydata()) == [1e-3, 1e-3]


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
