#!/usr/bin/env python
"""Draw the loss curves of one or several training runs from their metrics.jsonl.

    python tools/plot.py logs
    python tools/plot.py logs/small logs/large/metrics.jsonl -o loss.svg --x tokens --smooth 0.9
    python tools/plot.py logs --key train/lm_loss train/grad_norm 'gradient_norms/*mlp*' --log y

Every key has a chart of its own. A `train/...` key is drawn as a line, its `validation/...`
sibling, where there is one, as dots of the same colour. Needs matplotlib only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACES = ("iteration", "time", "tokens")
X_LABELS = {"iteration": "iteration", "time": "hours since the start", "tokens": "tokens"}


class PlotError(Exception):
    """A file or key that cannot be drawn; the text says which and what there is instead."""


@dataclass(frozen=True)
class Run:
    """The rows of one metrics.jsonl, in the order of their iterations."""

    name: str
    path: Path
    rows: list[dict]

    def series(self, key: str, x: str = "iteration") -> tuple[list[float], list[float]]:
        """(places, values) of a key. A null (not a number) becomes NaN: a gap in the line.

        Time is in hours since the run's first iteration, pauses between resumptions included.
        """
        if missing := [row["iteration"] for row in self.rows if key in row and x not in row]:
            raise PlotError(
                f"{self.path} has no {x!r} at iteration {missing[0]}; use --x iteration"
            )
        points = [(row[x], row[key]) for row in self.rows if key in row]
        places = [place for place, _ in points]
        if x == "time":
            places = [(place - self.rows[0]["time"]) / 3600 for place in places]
        return places, [math.nan if value is None else value for _, value in points]

    def matching(self, pattern: str) -> list[str]:
        """The keys that `pattern` names, with * and ? as in a shell. PlotError when none does."""
        known = sorted({name for row in self.rows for name in row} - set(PLACES))
        if pattern in known:
            return [pattern]
        if found := fnmatch.filter(known, pattern):
            return found
        raise PlotError(f"{self.path} has no {pattern!r}; it has {_shortened(known)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="LOGDIR_OR_JSONL")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("loss.png"),
        help="the ending says the format: png, svg, pdf (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--key", nargs="+", default=["train/lm_loss"], metavar="KEY",
        help="* and ? stand for any letters (default: train/lm_loss)",
    )  # fmt: skip
    parser.add_argument("--x", choices=PLACES, default="iteration", help="default: %(default)s")
    parser.add_argument(
        "--smooth", type=_weight, default=0.0, metavar="W",
        help="weight of the past in a moving average, 0 (none) to below 1",
    )  # fmt: skip
    parser.add_argument("--log", choices=("x", "y", "xy"), default="", help="logarithmic axes")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(path) for path in options.runs]
        figure = draw(runs, options.key, x=options.x, smooth=options.smooth, log=options.log)
        save(figure, options.output)
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {', '.join(options.key)} of {', '.join(run.name for run in runs)}")
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


def draw(
    runs: list[Run],
    patterns: list[str],
    *,
    x: str = "iteration",
    smooth: float = 0.0,
    log: str = "",
) -> Figure:
    """A chart for each pattern with every run's curves. PlotError on what a run does not have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 4 * len(patterns)), layout="constrained")
    all_axes = figure.subplots(len(patterns), 1, squeeze=False)[:, 0]
    for axes, pattern in zip(all_axes, patterns, strict=True):
        for run in runs:
            for key in run.matching(pattern):
                _draw_key(axes, run, key, x, smooth)
        if x == "iteration" and "x" not in log:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        _, _, metric = pattern.partition("/")
        is_loss = metric == "lm_loss"
        axes.set_xlabel(X_LABELS[x])
        axes.set_ylabel("loss (nats per token)" if is_loss else metric.replace("_", " ") or pattern)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small" if len(axes.lines) > 8 else None)
    return figure


def _draw_key(axes: Axes, run: Run, key: str, x: str, smooth: float) -> None:
    places, values = run.series(key, x)
    chart, _, metric = key.partition("/")
    label = f"{run.name}, {chart if chart in ('train', 'validation', 'test') else key}"
    marker = "o" if len(values) == 1 else None  # a line of one point would be invisible
    (line,) = axes.plot(
        places, smoothed(values, smooth), linewidth=1.4, marker=marker, label=label, zorder=2
    )
    if smooth:
        axes.plot(places, values, linewidth=0.8, alpha=0.25, color=line.get_color(), zorder=1)
    if chart == "train":
        places, values = run.series(f"validation/{metric}", x)
        if values:
            label = f"{run.name}, validation"
            axes.plot(places, values, "o--", markersize=4, color=line.get_color(), label=label)


def smoothed(values: list[float], weight: float) -> list[float]:
    """The exponential moving average, free of the bias of its start; gaps stay gaps."""
    total = norm = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1.0
            value = total / norm
        result.append(value)
    return result


def save(figure: Figure, output: Path) -> None:
    """Write the figure in the format of the output's suffix."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise PlotError(f"{output}: {error}") from error


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def _shortened(names: list[str]) -> str:
    """Names to choose from; of a kind with many, such as gradient_norms/*, one pattern."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.partition("/")[0], []).append(name)
    parts = [
        name
        for kind, members in kinds.items()
        for name in (members if len(members) <= 8 else [f"{kind}/* ({len(members)} keys)"])
    ]
    return ", ".join(parts) or "nothing to draw"


if __name__ == "__main__":
    sys.exit(main())
