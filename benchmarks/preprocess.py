"""Documents per second of tools/preprocess_data.py, against the `tokenizers` library.

The peer is what a plain program does: one process that takes a line, parses it, encodes its text
with Tokenizer.encode, and writes the same .bin and .idx files. Both are whole commands, from the
start of Python to the last byte on disk, on the same documents and tokenizer; every round runs all
of them, in changing order, and the files must be equal byte for byte.

documents_per_s_over_tokenizers is the median over the rounds with --workers 1, one process against
one; documents_per_s_over_tokenizers_2_workers with two. peak_memory_at_10x_over_1x compares the
peak resident memory on ten times the input, added up over all processes, with the input itself; it
is the larger one of --workers 1 and 2.

    python benchmarks/preprocess.py [--quick] [--json FILE] [--input JSONL] [--tokenizer FILE]

--input: documents with a "text"; without it, pieces of the sources that Python carries.
--tokenizer: a tokenizer.json; without it, a byte-level BPE is trained on some of these.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

TARGET = 1.5
ENDINGS = ("bin", "idx")


@dataclass(frozen=True)
class Shape:
    """How much text, and how often."""

    name: str
    bytes: int  # about
    rounds: int


FULL = Shape("full", 16_000_000, rounds=7)
QUICK = Shape("quick", 8_000_000, rounds=3)


@dataclass(frozen=True)
class Run:
    seconds: float
    peak: int  # bytes resident, added up over the processes at their worst moment


def write_documents(path: Path, size: int) -> None:
    """Pieces of Python's sources, prose and code, of up to 4000 characters, in random order."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    pieces = []
    for source in sources:
        if not {"site-packages", "dist-packages"} & set(source.parts):
            text = source.read_text("utf-8", errors="ignore")
            pieces += [text[i : i + 4000] for i in range(0, len(text), 4000)]
    random.Random(1234).shuffle(pieces)
    with open(path, "w", encoding="utf-8") as file:
        for piece in pieces:
            if file.tell() > size:
                break
            file.write(json.dumps({"text": piece}) + "\n")


def train_tokenizer(path: Path, documents: Path) -> None:
    """Of GPT-2's kind."""
    from tools.train_tokenizer import train

    with open(documents, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:500]
    train(texts, 16384).save(str(path))


def one_by_one(documents: str, tokenizer_file: str, prefix: str) -> None:
    """The peer."""
    import struct

    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    eod = tokenizer.token_to_id("<|endoftext|>")
    dtype, code = (np.uint16, 8) if tokenizer.get_vocab_size() < 65500 else (np.int32, 4)
    lengths = []
    with open(documents, "rb") as lines, open(f"{prefix}_text_document.bin", "wb") as output:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"]).ids
            ids.append(eod)
            output.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    with open(f"{prefix}_text_document.idx", "wb") as output:
        header = (b"MMIDIDX\x00\x00", 1, code, len(lengths), len(lengths) + 1)
        output.write(struct.pack("<9sQBQQ", *header))
        output.write(np.array(lengths, dtype=np.int32).tobytes())
        output.write(offsets.astype(np.int64).tobytes())
        output.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def peer(documents: Path, tokenizer: Path, prefix: Path) -> list[str]:
    return [sys.executable, __file__, "--peer", str(documents), str(tokenizer), str(prefix)]


def ours(documents: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools/preprocess_data.py"), "--append-eod"),
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", str(tokenizer)),
        *("--input", str(documents), "--output-prefix", str(prefix), "--workers", str(workers)),
    ]


def timed(command: Sequence[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started


def peak_memory(command: Sequence[str]) -> int:
    """The most that the command and its processes hold together, seen 50 times a second."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(resident(pid) for pid in session(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return peak


def session(leader: int) -> list[int]:
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if os.getsid(pid) == leader:
                found.append(pid)
        except OSError:
            pass  # it has ended
    return found


def resident(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def compete(shape: Shape, documents: Path, tokenizer: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of every round, by contestant."""
    commands = {
        "tokenizers, one by one": peer(documents, tokenizer, folder / "peer"),
        "--workers 1": ours(documents, tokenizer, folder / "one", 1),
        "--workers 2": ours(documents, tokenizer, folder / "two", 2),
    }
    seconds: dict[str, list[float]] = {who: [] for who in commands}
    bar = log.progress(total=shape.rounds, desc="rounds", unit=" rounds")
    for i in range(-1, shape.rounds):  # round -1 warms up
        for who in list(commands) if i % 2 else reversed(commands):
            passed = timed(commands[who])
            if i >= 0:
                seconds[who].append(passed)
        bar.update(i >= 0)
    bar.close()
    for ending in ENDINGS:
        files = [folder / f"{name}_text_document.{ending}" for name in ("peer", "one", "two")]
        if len({file.read_bytes() for file in files}) != 1:
            sys.exit(f"the .{ending} files differ")
    return seconds


def grown(documents: Path, tokenizer: Path, folder: Path) -> dict[int, tuple[int, int]]:
    """Peak bytes on the documents, and on ten times as many, by --workers."""
    tenfold = folder / "tenfold.jsonl"
    with open(tenfold, "wb") as output:
        for _ in range(10):
            with open(documents, "rb") as file:
                shutil.copyfileobj(file, output)
    found = {}
    for workers in (1, 2):
        once, ten = (
            peak_memory(ours(path, tokenizer, folder / "memory", workers))
            for path in (documents, tenfold)
        )
        found[workers] = (once, ten)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 MB instead of 16, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--input", type=Path, metavar="JSONL")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL

    with tempfile.TemporaryDirectory(prefix="neox-preprocess-") as name:
        folder = Path(name)
        documents = arguments.input or folder / "documents.jsonl"
        if not arguments.input:
            write_documents(documents, shape.bytes)
        tokenizer = arguments.tokenizer or folder / "tokenizer.json"
        if not arguments.tokenizer:
            train_tokenizer(tokenizer, documents)
        seconds = compete(shape, documents, tokenizer, folder)
        peaks = grown(documents, tokenizer, folder)
        with open(documents, "rb") as file:
            count = sum(1 for _ in file)
        show(shape, count, documents.stat().st_size, seconds, peaks, arguments.json)


def show(
    shape: Shape,
    count: int,
    size: int,
    seconds: dict[str, list[float]],
    peaks: dict[int, tuple[int, int]],
    output: Path | None,
) -> None:
    """Print the table and the figures; write them to `output`."""
    print(f"{count} documents, {size / 1e6:.1f} MB of JSON Lines; medians of {shape.rounds} rounds")
    print(f"{'':24}{'seconds':>9}{'documents/s':>13}{'MB/s':>7}")
    for who, values in seconds.items():
        middle = statistics.median(values)
        print(f"{who:24}{middle:9.2f}{count / middle:13.0f}{size / middle / 1e6:7.1f}")
    theirs, *both = seconds.values()
    ratios = [[a / b for a, b in zip(theirs, values, strict=True)] for values in both]
    growth = max(ten / once for once, ten in peaks.values())
    figures = {
        "documents_per_s_over_tokenizers": statistics.median(ratios[0]),
        "documents_per_s_over_tokenizers_2_workers": statistics.median(ratios[1]),
        "peak_memory_at_10x_over_1x": growth,
    }
    notes = [f"{min(values):.2f} to {max(values):.2f}; target {TARGET}" for values in ratios]
    notes.append(
        ", ".join(
            f"--workers {workers}: {once / 1e6:.0f} MB, {ten / 1e6:.0f} MB"
            for workers, (once, ten) in peaks.items()
        )
    )
    for (key, value), note in zip(figures.items(), notes, strict=True):
        print(f"{key:42}{value:8.3f}   ({note})")
    if output:
        write_text(output, json.dumps(figures) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        one_by_one(*sys.argv[2:])
    else:
        main()
