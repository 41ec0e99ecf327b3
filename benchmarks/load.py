"""Loading a checkpoint, cold: against `cat` of the same files, and against transformers.

The checkpoint is a slice of GPT-NeoX-20B, 8 layers of random weights in fp16, in two shards as the
published one. Ours loads it at tp 1 with load_model, verifying every file; the peer is
GPTNeoXForCausalLM.from_pretrained on the same weights exported. Every turn is a fresh process; the
three take turns. Seconds are counted, after the imports, from the moment that the files are dropped
from memory until every page of every weight is in memory.

wall_over_cat and wall_over_transformers are medians over the rounds of one turn against the other.
peak_over_weights is the peak resident memory of our whole process over the weights' bytes: imports
and all, and the pages of mapped files that the system counts with it. "private" is what the process
holds of its own, without those pages. reshard_peak_gib is the peak resident memory of
`tools/checkpoint.py reshard` from two shards to one.

    python benchmarks/load.py [--quick] [--json FILE]

It takes three times the checkpoint's size of disk in TMPDIR, which is empty again afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

THREADS = 2
GIB = 1 << 30
PAGE = 4096
WALL_TARGET, RESHARD_TARGET = 1.5, 3.0


@dataclass(frozen=True)
class Shape:
    """A slice of 20B, and how often it is loaded."""

    name: str
    flags: tuple[str, ...]
    bytes: int  # about
    rounds: int


FULL = Shape("8 layers of 20B", ("--num_layers=8",), 8_600_000_000, rounds=5)
QUICK = Shape(
    "small",
    ("--num_layers=4", "--hidden_size=512", "--num_attention_heads=8"),
    130_000_000,
    rounds=3,
)


def ours(folder: str) -> None:
    """A turn: load the checkpoint at tp 1."""
    log.quiet_third_parties()
    import torch

    from neox.checkpoint.neox import Checkpoint
    from neox.config import from_dict
    from neox.inference.load import load_model
    from neox.parallel.groups import ProcessGroups

    torch.set_num_threads(THREADS)
    manifest = Checkpoint.open(Path(folder)).manifest
    assert manifest is not None
    values = {**manifest.architecture, "seq_length": 2048, "precision": "fp16", "load": folder}
    config = from_dict(values)
    groups = ProcessGroups.single()
    forget([Path(folder)])
    started = time.perf_counter()
    load_model(config, groups)  # it copies: every page of the weights has been written
    print(json.dumps({"seconds": time.perf_counter() - started}))


def transformers(folder: str) -> None:
    """A turn of the peer."""
    log.quiet_third_parties()
    import torch
    from transformers import GPTNeoXForCausalLM

    torch.set_num_threads(THREADS)
    forget([Path(folder)])
    started = time.perf_counter()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float16, local_files_only=True)
    size = 0
    for weight in model.parameters():  # they may still be in the mapped file: touch every page
        weight.detach().view(-1)[:: PAGE // weight.element_size()].sum()
        size += weight.numel() * weight.element_size()
    print(json.dumps({"seconds": time.perf_counter() - started, "weights": size}))


@dataclass(frozen=True)
class Run:
    """What a program printed, and its peak memory in bytes."""

    output: str
    resident: int
    private: int  # anonymous and shared memory, without the pages of files


def run(*command: str) -> Run:
    """Run a program in the repository; its output is shown only when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    private = 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        while not ended:
            private = max(private, private_memory(process.pid))
            time.sleep(0.01)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    return Run(text, usage.ru_maxrss * 1024, private)


def private_memory(pid: int) -> int:
    """Bytes at this moment; 0 of a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem"))


def turn(who: str, folder: Path) -> tuple[Run, dict[str, Any]]:
    """A process that loads the folder, and what it printed."""
    code = f"import benchmarks.load as load; load.{who}({str(folder)!r})"
    process = run(sys.executable, "-c", code)
    return process, json.loads(process.output.splitlines()[-1])


def forget(folders: Sequence[Path]) -> None:
    """Have the system drop from memory what it holds of the files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:  # not root: these files, at least
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def prepare(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Synthesize the checkpoint and export it: (NeoX's folder, transformers' folder)."""
    free = shutil.disk_usage(folder).free
    if free < 3.1 * shape.bytes:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB free, and {3.1 * shape.bytes / 1e9:.1f} GB are "
            "needed. Set TMPDIR to a folder on another disk."
        )
    tool = (sys.executable, "tools/checkpoint.py")
    checkpoint, exported = folder / "neox", folder / "transformers"
    log.info(f"synthesizing {shape.name} in {folder}")
    flags = ("--config", "configs/20B.yml", "--model_parallel_size", "2", "--dtype", "fp16")
    run(*tool, "synthesize", *flags, *shape.flags, "--output", str(checkpoint))
    log.info("exporting it to transformers")
    run(*tool, "convert", str(checkpoint), "--to", "transformers", "--output", str(exported))
    return checkpoint, exported


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="130 MB instead of 8.6 GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL

    with tempfile.TemporaryDirectory(prefix="neox-load-") as name:
        folder = Path(name)
        folders = prepare(folder, shape)
        files = sorted(str(path) for path in folders[0].glob("global_step*/layer_*"))
        seconds: dict[str, list[float]] = {"ours": [], "cat": [], "transformers": []}
        runs: dict[str, list[Run]] = {"ours": [], "transformers": []}
        weights = 0
        bar = log.progress(total=shape.rounds, desc=shape.name, unit=" rounds")
        for i in range(shape.rounds):
            for who in list(seconds) if i % 2 else reversed(seconds):
                if who == "cat":
                    forget([folders[0]])
                    seconds[who].append(timed_cat(files))
                else:
                    process, said = turn(who, folders[who != "ours"])
                    seconds[who].append(said["seconds"])
                    runs[who].append(process)
                    weights = said.get("weights", weights)
            bar.update(1)
        bar.close()
        forget(folders)
        resharded = run(
            *(sys.executable, "tools/checkpoint.py", "reshard", str(folders[0])),
            *("--model_parallel_size", "1", "--output", str(folder / "resharded")),
        )
    show(shape, seconds, runs, weights, resharded, arguments.json)


def timed_cat(files: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def show(
    shape: Shape,
    seconds: dict[str, list[float]],
    runs: dict[str, list[Run]],
    weights: int,
    resharded: Run,
    output: Path | None,
) -> None:
    """Print the table and the figures; write them to `output`."""
    print(
        f"{shape.name}: {weights / 1e9:.2f} GB of weights in fp16, 2 shards on disk; medians of "
        f"{shape.rounds} rounds"
    )
    print(f"{'':14}{'seconds':>9}{'GB/s':>8}{'peak GB':>10}{'private GB':>12}")
    for who, values in seconds.items():
        middle = statistics.median(values)
        line = f"{who:14}{middle:9.2f}{weights / middle / 1e9:8.2f}"
        if who in runs:
            line += "".join(
                f"{max(getattr(process, kind) for process in runs[who]) / 1e9:{width}.2f}"
                for kind, width in (("resident", 10), ("private", 12))
            )
        print(line)
    ratios = {
        peer: [a / b for a, b in zip(seconds["ours"], seconds[peer], strict=True)]
        for peer in ("cat", "transformers")
    }
    peak = max(process.resident for process in runs["ours"])
    figures = {
        "wall_over_cat": statistics.median(ratios["cat"]),
        "wall_over_transformers": statistics.median(ratios["transformers"]),
        "peak_over_weights": peak / weights,
        "reshard_peak_gib": resharded.resident / GIB,
    }
    notes = {
        "wall_over_cat": f"{spread(ratios['cat'])}; target {WALL_TARGET}",
        "wall_over_transformers": spread(ratios["transformers"]),
        "peak_over_weights": f"target {1.1 + GIB / weights:.2f}: weights x 1.1 + 1 GiB",
        "reshard_peak_gib": f"target {RESHARD_TARGET}; {resharded.private / GIB:.2f} private",
    }
    for key, value in figures.items():
        print(f"{key:24}{value:8.3f}   ({notes[key]})")
    if output:
        write_text(output, json.dumps(figures) + "\n")


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
