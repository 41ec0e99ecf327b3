"""metrics.jsonl: what a run measured, one line for each iteration, rewound when it is resumed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from neox import log
from neox.atomic import replacing

Row = dict[str, float | None]


class Journal:
    """One JSON object per iteration: `iteration`, `time` (of its end, seconds since 1970), values.

    With `tokens_per_iteration` also `tokens`, the number of tokens trained on so far. A line is on
    disk as soon as it is logged; what the same iteration logs later (its evaluation) is put into
    that line. JSON has no NaN and no infinity: such a value is written as null.

    `iteration` is the one that training starts from: later lines are of steps that will be done
    again, and are dropped. At 0 the earlier file is kept beside the new one, unless that `replaces`
    it: what is there may be another run's.
    """

    def __init__(
        self,
        path: Path,
        iteration: int,
        *,
        tokens_per_iteration: int | None = None,
        replaces: bool = False,
    ) -> None:
        if iteration == 0 and not replaces and path.exists() and path.stat().st_size:
            aside = _free_name(path)
            path.rename(aside)
            log.info(f"{path} of an earlier run is kept as {aside.name}")
        last, dropped = _rewind(path, iteration) if path.exists() else (b"", 0)
        if dropped and not replaces:
            log.info(
                f"{path}: dropped {dropped} lines of an earlier run after iteration {iteration}"
            )
        self._tokens_per_iteration = tokens_per_iteration
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._path = path
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (closed by close)
        self._row: Row = json.loads(last) if last else {}
        self._start = self._file.seek(0, os.SEEK_END) - len(last)

    def rows(self) -> Iterator[Row]:
        """What is in the file, line by line."""
        with open(self._path, "rb") as file:
            yield from map(json.loads, file)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._row.get("iteration") != step:
            self._start = self._file.seek(0, os.SEEK_END)
            self._row = {"iteration": step, "time": round(time.time(), 3)}
            if self._tokens_per_iteration is not None:
                self._row["tokens"] = step * self._tokens_per_iteration
        for key, value in values.items():
            self._row[key] = value if math.isfinite(value) else None
        self._file.seek(self._start)
        self._file.write(_json_line(self._row).encode())  # one call: a kill leaves whole lines
        self._file.truncate()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        self._file.close()


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return name


def _rewind(path: Path, iteration: int) -> tuple[bytes, int]:
    """Drop the lines after `iteration`: the last one that is left, and how many are not."""
    last, dropped = b"", 0
    with replacing(path) as kept, open(path, "rb") as file:
        for line in file:
            try:
                keep = json.loads(line)["iteration"] <= iteration and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):  # torn, where a machine went down
                keep = False
            if keep:
                last = line
                kept.write(line)
            else:
                dropped += 1
    return last, dropped


def _json_line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
