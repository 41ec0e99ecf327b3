"""Whether a long training run's memory stays flat: real train.py processes, watched from outside.

A tiny model trains for as many steps as an ordinary one does in two hours, with everything that
recurs in a run: blended data, validation, scores on tasks, checkpoints of which the last two are
kept, metrics.jsonl, TensorBoard, W&B offline, norms. Once in one process, and once in two at tp 2.
Of every process the memory of its own (anonymous and shared pages; those of mapped files come and
go), its open files and its threads are read while it trains. Memory goes up and down within a step,
so a part of a run counts by its lowest quarter; the slope is the median slope between any two parts
after the first third of the steps, or that between the first and the last if it is less.

    python benchmarks/soak.py [--quick] [--steps N] [--json FILE]

Exit status 1 when memory grows by more than LIMIT_MB per 1000 steps, or files or threads pile up.
--quick: few steps of one process, which find a leak of 40 KB a step, and no smaller ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

STEPS = {1: 14_400, 2: 6_000}  # by processes: 14,400 steps of half a second are two hours
QUICK_STEPS = {1: 300}
# A batch that is kept each step makes 40. Where nothing is kept, the allocator's ups and downs have
# made slopes between -0.9 and 0.7 over 4000 steps, and between 0 and 0.3 over 8000.
LIMIT_MB = 1.0
QUICK_LIMIT_MB = 40.0  # the allocator has not settled yet
PARTS = 36  # of a run, of which the slope has the last 24
MB = 1 << 20


class Reading(NamedTuple):
    """One process at one moment."""

    step: int
    bytes: int
    files: int
    threads: int


@dataclass(frozen=True)
class Verdict:
    """What the readings of one process say."""

    name: str
    steps: int
    readings: int
    first_mb: float  # at the end of the first third, where the slope begins
    last_mb: float
    mb_per_1000_steps: float
    more_files: int  # in the last third than in the one before
    more_threads: int

    def problems(self, limit_mb: float) -> list[str]:
        found = []
        if self.mb_per_1000_steps > limit_mb:
            found.append(
                f"{self.name} grows by {self.mb_per_1000_steps:.2f} MB per 1000 steps, and may by "
                f"{limit_mb:g}"
            )
        if self.more_files > 0:
            found.append(f"{self.name} keeps {self.more_files} more files open than before")
        if self.more_threads > 0:
            found.append(f"{self.name} has {self.more_threads} more threads than before")
        return found


def judge(name: str, readings: Sequence[Reading]) -> Verdict:
    """Readings in the order of time; those before the first third of the steps are a start."""
    last = readings[-1].step
    settled = [reading for reading in readings if last / 3 <= reading.step < last]  # not the end
    late = [reading for reading in settled if reading.step >= 2 * last / 3]
    early = [reading for reading in settled if reading.step < 2 * last / 3]
    assert len(early) > 2 and len(late) > 2, f"{name}: too few readings ({len(readings)})"
    parts = [
        [reading for reading in settled if reading.step * PARTS // last == part]
        for part in range(PARTS)
    ]
    points = [(statistics.mean(r.step for r in part), _low(part)) for part in parts if part]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2)]
    (x1, y1), (x2, y2) = points[0], points[-1]
    # What is kept shows in both; the allocator's ups and downs seldom do.
    slope = min(statistics.median(slopes), (y2 - y1) / (x2 - x1))
    # Files are open for moments, and so are threads alive: what never goes away is what counts.
    return Verdict(
        name,
        last,
        len(readings),
        points[0][1] / MB,
        points[-1][1] / MB,
        slope * 1000 / MB,
        min(r.files for r in late) - min(r.files for r in early),
        min(r.threads for r in late) - min(r.threads for r in early),
    )


def _low(readings: Sequence[Reading]) -> float:
    """Bytes between two steps, when no activations are there: the lowest quarter's upper end."""
    return sorted(reading.bytes for reading in readings)[len(readings) // 4]


def write_run(folder: Path, processes: int, steps: int, quick: bool) -> None:
    """Datasets and soak.yml."""
    import numpy as np

    from neox.data.indexed import IndexedWriter

    draw = np.random.RandomState(1)
    for name, documents in {"a": 400, "b": 100, "c": 30, "valid": 60, "test": 60}.items():
        lengths = draw.randint(20, 400, size=documents)
        with IndexedWriter(folder / name, vocab_size=512) as writer:
            writer.add(draw.randint(2, 250, size=lengths.sum()).astype(np.uint16), lengths)
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 128,
        "max_position_embeddings": 128,
        "pos_emb": "rotary",
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "precision": "fp32",
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "tokenizer_type": "CharLevelTokenizer",
        "train_data_paths": [str(folder / name) for name in "abc"],
        "train_data_weights": [3.0, 2.0, 1.0],
        "valid_data_paths": [str(folder / "valid")],
        "valid_data_weights": [1.0],
        "test_data_paths": [str(folder / "test")],
        "test_data_weights": [1.0],
        "model_parallel_size": processes,
        "pipe_parallel_size": 1,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1 if quick else 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
        "train_iters": steps,
        "lr_decay_iters": steps,
        "log_interval": 10,
        "eval_interval": 10 if quick else 100,
        "eval_iters": 2,
        "char_level_ppl": True,
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 15 if quick else 100,
        "keep_last_n_checkpoints": 2,
        "checkpoint_validation_with_forward_pass": True,
        "log_dir": str(folder / "logs"),
        "tensorboard_dir": str(folder / "tensorboard"),
        "use_wandb": True,
        "log_param_norm": True,
        "log_grad_norm": True,
        "log_grad_pct_zeros": True,
        "log_optimizer_states": True,
    }
    if not quick:
        values |= {
            "eval_tasks": ["lambada", "piqa"],
            "eval_data_dir": str(ROOT / "configs/demo_eval"),
            "eval_own_documents": True,
            "limit": 2,
        }
    (folder / "soak.yml").write_text(json.dumps(values))


def soak(folder: Path, processes: int, steps: int, quick: bool) -> list[Verdict]:
    """Run train.py and watch it. RuntimeError with its last lines when it fails."""
    write_run(folder, processes, steps, quick)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    readings: dict[int, list[Reading]] = {}
    names: dict[int, str] = {}
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, ROOT / "deepy.py", "train.py", folder / "soak.yml"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        metrics = folder / "logs/metrics.jsonl"
        step = 0
        try:
            with log.progress(total=steps, desc=f"{processes} processes", unit=" steps") as bar:
                while run.poll() is None:
                    step = max(step, last_step(metrics))
                    bar.update(step - bar.n)
                    for pid, name in trainers(run.pid, processes).items() if step else ():
                        reading = read(pid, step)
                        if reading is not None:
                            names.setdefault(pid, name)
                            readings.setdefault(pid, []).append(reading)
                    time.sleep(0.05 if quick else 0.5)
        finally:
            run.terminate()
            run.wait()
    if run.returncode or last_step(metrics) != steps:
        tail = "\n".join((folder / "output").read_text().splitlines()[-10:])
        raise RuntimeError(f"train.py ended at step {step} with status {run.returncode}:\n{tail}")
    kept = sorted(path.name for path in (folder / "checkpoints").glob("global_step*"))
    assert len(kept) == 2, f"keep_last_n_checkpoints is 2, and there are {kept}"
    assert len(readings) == processes, f"{len(readings)} of {processes} processes were found"
    return [judge(names[pid], found) for pid, found in sorted(readings.items())]


def last_step(metrics: Path) -> int:
    """The iteration of the last whole line of metrics.jsonl; 0 without one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            for line in reversed(file.read().splitlines()):
                try:
                    return int(json.loads(line)["iteration"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by the seek, or being written
    except OSError:
        pass
    return 0


def trainers(pid: int, processes: int) -> dict[int, str]:
    """The processes that train, of the run that `pid` started: itself, or its workers."""
    if processes == 1:
        return {pid: "the process"}
    found, level = [], [pid]
    while level:
        level = [child for parent in level for child in children(parent)]
        found += [child for child in level if is_worker(child)]
    if len(found) < processes:
        return {}  # the last steps are done
    return {child: f"rank {rank}" for rank, child in enumerate(sorted(found))}


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # The launcher has the worker's name among its arguments, but is a module of its own.
    return any(b"neox" in word and b"worker" in word for word in words) and not any(
        word.startswith(b"deepspeed.launcher") for word in words
    )


def read(pid: int, step: int) -> Reading | None:
    """None when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    if "RssAnon" not in status:
        return None  # it is ending
    own = sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))
    return Reading(step, own, files, int(status["Threads"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds of one process")
    parser.add_argument("--steps", type=int, help="instead of STEPS, in one and in two processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there too")
    arguments = parser.parse_args()
    limit = QUICK_LIMIT_MB if arguments.quick else LIMIT_MB
    plan = QUICK_STEPS if arguments.quick else STEPS
    verdicts: list[Verdict] = []
    for processes, steps in plan.items():
        with tempfile.TemporaryDirectory(prefix="neox-soak-") as folder:
            started = time.monotonic()
            found = soak(Path(folder), processes, arguments.steps or steps, arguments.quick)
            minutes = (time.monotonic() - started) / 60
        for verdict in found:
            print(
                f"{processes} processes, {verdict.name}: {verdict.steps} steps in {minutes:.1f} "
                f"minutes, {verdict.first_mb:.1f} -> {verdict.last_mb:.1f} MB, "
                f"{verdict.mb_per_1000_steps:+.3f} MB per 1000 steps, "
                f"{verdict.more_files:+d} files, {verdict.more_threads:+d} threads",
                flush=True,
            )
        verdicts += found
    worst = max(verdict.mb_per_1000_steps for verdict in verdicts)
    problems = [problem for verdict in verdicts for problem in verdict.problems(limit)]
    if arguments.json:
        body = {"mb_per_1000_steps": worst, "runs": [asdict(verdict) for verdict in verdicts]}
        write_text(arguments.json, json.dumps(body, indent=1) + "\n")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
