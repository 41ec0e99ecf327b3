"""What a user sees: our lines, from one rank, without the libraries' chatter."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import TextIO

_rank = 0


def set_rank(rank: int) -> None:
    """Only rank 0 speaks; every other rank's lines are dropped."""
    global _rank
    _rank = rank


def info(message: str) -> None:
    """Print one line to standard output, from rank 0."""
    if _rank == 0:
        _print(message, sys.stdout)


def warning(message: str) -> None:
    """Print one line to standard error, from rank 0."""
    if _rank == 0:
        _print(f"warning: {message}", sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    """Print a line above the progress bars that are up, instead of through them."""
    tqdm = sys.modules.get("tqdm")  # not imported: no bar is up
    with tqdm.tqdm.external_write_mode(file=stream) if tqdm else contextlib.nullcontext():
        print(message, file=stream, flush=True)


def progress(*, total: int, desc: str, unit: str = "it", initial: int = 0):
    """A tqdm bar with the time left; shown on a terminal by rank 0, silent anywhere else."""
    from tqdm import tqdm

    shown = _rank == 0 and sys.stderr.isatty()
    columns, lines = _size(sys.stderr) if shown else (None, None)
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        ncols=columns,
        nrows=lines,
        disable=not shown,
        leave=False,
    )


def _size(terminal: TextIO) -> tuple[int | None, int | None]:
    """For tqdm: it shows nothing where a terminal has no size, as under a scheduler's pty."""
    size = os.get_terminal_size(terminal.fileno())
    return (None, None) if size.columns and size.lines else (80, 24)


def quiet_third_parties() -> None:
    """Silence libraries' logs and warnings, but not their errors. Call before importing them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler
    for name in (
        "deepspeed",
        "DeepSpeed",
        "megatron",
        "transformers",
        "lm_eval",
        "matplotlib",
        "datasets",
        "torch",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
