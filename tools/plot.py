#!/usr/bin/env python
"""Draw the loss curves of one or several training runs from their metrics.jsonl.

    python tools/plot.py logs -o loss.png
    python tools/plot.py logs/small logs/large/metrics.jsonl -o lr.png --key train/learning_rate

A `train/...` key is drawn as a line, its `validation/...` sibling, where there is one, as dots of
the same colour. Needs matplotlib only.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PlotError(Exception):
    """A file or key that cannot be drawn; the text says which and what there is instead."""


@dataclass(frozen=True)
class Run:
    """The rows of one metrics.jsonl, in the order of their iterations."""

    name: str
    path: Path
    rows: list[dict]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(iterations, values) of a key. A null (not a number) becomes NaN: a gap in the line."""
        points = [(row["iteration"], row[key]) for row in self.rows if key in row]
        values = [float("nan") if value is None else value for _, value in points]
        return [iteration for iteration, _ in points], values


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="LOGDIR_OR_JSONL")
    parser.add_argument("-o", "--output", type=Path, default=Path("loss.png"))
    parser.add_argument("--key", default="train/lm_loss", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(path) for path in options.runs]
        save(draw(runs, options.key), options.output)
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {options.key} of {', '.join(run.name for run in runs)}")
    return 0


def load_run(path: Path) -> Run:
    """The run in a log_dir or a .jsonl file, named as the command line names it."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    name = file.parent if file.name == "metrics.jsonl" else file
    return Run(str(name), file, read_rows(file))


def read_rows(file: Path) -> list[dict]:
    """The objects of a metrics.jsonl. Raises PlotError with the line number of a bad one."""
    if not file.exists():
        raise PlotError(f"{file} does not exist; training writes it into the run's log_dir")
    rows = []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["iteration"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise PlotError(
                f'{file}, line {number} is not a JSON object with a number "iteration"'
            ) from error
        rows.append(row)
    if not rows:
        raise PlotError(f"{file} is empty: no iteration has been logged yet")
    return rows


def draw(runs: list[Run], key: str) -> Figure:
    """One axis with every run's curve. Raises PlotError on a key that a run does not have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    chart, _, metric = key.partition("/")
    for run in runs:
        iterations, values = run.series(key)
        if not values:
            known = ", ".join(sorted({name for row in run.rows for name in row} - {"iteration"}))
            raise PlotError(f"{run.path} has no {key!r}; it has {known or 'nothing to draw'}")
        marker = "o" if len(values) == 1 else None  # a line of one point would be invisible
        label = f"{run.name}, {chart}"
        (line,) = axes.plot(iterations, values, linewidth=1.4, marker=marker, label=label)
        iterations, values = run.series(f"validation/{metric}")
        if chart == "train" and values:
            label = f"{run.name}, validation"
            axes.plot(iterations, values, "o--", markersize=4, color=line.get_color(), label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)" if metric == "lm_loss" else metric.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def save(figure: Figure, output: Path) -> None:
    """Write the figure in the format of the output's suffix."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise PlotError(f"{output}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
