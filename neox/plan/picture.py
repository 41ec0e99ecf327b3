"""A pipeline's schedule as a picture: lines of text, or a file by matplotlib."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from string import ascii_lowercase

from neox.atomic import write_bytes
from neox.errors import ConfigError
from neox.plan.schedule import Slot, Timeline

WIDTH = 96  # characters of a line
FORWARD, BACKWARD = "#7fb2e5", "#f2a65a"
MOST = 2000  # passes that a picture can show
FORMATS = (".png", ".svg", ".pdf")


def as_text(timeline: Timeline, width: int = WIDTH) -> str:
    """A line for each stage; a column is a moment.

    A digit is a forward pass of that micro-batch (the last digit of its number), a letter a
    backward pass (a is micro-batch 0), a point waiting.
    """
    lines = []
    for stage in range(timeline.stages):
        columns = ["."] * width
        for slot in timeline.slots:
            if slot.stage == stage:
                scale = width / timeline.seconds
                first, last = round(slot.start * scale), round(slot.end * scale)
                columns[first:last] = [_sign(slot)] * (last - first)
        lines.append(f"stage {stage:<3}{''.join(columns[:width])}")
    return "\n".join(lines)


def _sign(slot: Slot) -> str:
    number = slot.work.micro_batch
    return str(number % 10) if slot.work.is_forward else ascii_lowercase[number % 26]


def check_picture(path: Path) -> None:
    """ConfigError for a kind of file that cannot be drawn."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends with {', '.join(FORMATS)}.")


def draw(timeline: Timeline, path: Path) -> None:
    """Write the picture to a .png, .svg or .pdf file.

    ConfigError for another kind of file, and for more passes than can be told apart.
    """
    check_picture(path)
    if len(timeline.slots) > MOST:
        raise ConfigError(
            f"A picture of {len(timeline.slots)} passes shows nothing; {MOST} are the limit. "
            "Draw fewer micro-batches."
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.6 * timeline.stages + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for slot in timeline.slots:
        axes.broken_barh(
            [(slot.start, slot.end - slot.start)],
            (slot.stage - 0.45, 0.9),
            facecolor=FORWARD if slot.work.is_forward else BACKWARD,
            edgecolor="white",
            linewidth=0.5,
        )
        if len(timeline.slots) <= MOST // 8:
            middle = (slot.start + slot.end) / 2
            number = str(slot.work.micro_batch)
            axes.text(middle, slot.stage, number, ha="center", va="center", fontsize=7)
    axes.set_xlim(0, timeline.seconds)
    axes.set_yticks(range(timeline.stages), [f"stage {i}" for i in range(timeline.stages)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds; blue: forward passes, orange: backward passes, white: waiting")
    axes.set_title(f"{timeline.seconds:.3g} s, bubble {timeline.bubble:.1%}", fontsize=10)
    content = BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=150)
    write_bytes(path, content.getvalue())
