"""Generation against transformers, CTranslate2 and llama.cpp: one model in every one's format.

Every contestant is a process with its model in memory; they take turns (benchmarks/contestants.py).
A turn reads a prompt of 128 tokens and chooses 64 greedily. Prefill is the prompt's tokens over the
time to the first new token, decode the other 63 over the time from there to the last. Another
process measures in each round how fast two threads read memory and multiply matrices at best; a
decoded token has to read the blocks and the output projection once, a prompt's token has to be
multiplied with the blocks, and shares are of that limit.

batch16_over_single is decode of 16 prompts at a time against one, batch16_total_over_single all
the tokens over all the time, prompts included. Ratios are medians over the rounds of one turn
against another. Where the first tokens are not the reference's, the table says so: in fp32 the
figures of a program that computes something else mean nothing.

    python benchmarks/generate.py [--quick] [--json FILE] [--only fp32,int8,int4,llama.cpp,...]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peer_models  # noqa: E402
from benchmarks.contestants import THREADS, Contestants, Turn  # noqa: E402
from benchmarks.generators import (  # noqa: E402
    BATCH,
    CONTESTANTS,
    NEW,
    PROMPT,
    Contestant,
    Generation,
    ours,
)
from benchmarks.limits import Limits, measure_limits  # noqa: E402
from benchmarks.peer_models import SHAPE_410M, TINY, Shape  # noqa: E402
from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

AGREE = 16  # first tokens that programs in fp32 have to agree on
FULL_ROUNDS, QUICK_ROUNDS = 5, 3
# Of a weight in a format, scales included: 4 bits and a scale of 16 for every 32 weights.
BITS = {"fp32": 32.0, "int8": 8.0, "int4": 4.5}

# What is compared: the figure, what of a turn, ours, the peer's, and the target.
RATIOS = (
    ("fp32_decode_over_transformers", "decode", "ours fp32", "transformers fp32", 2.8),
    ("fp32_decode_over_llama_cpp", "decode", "ours fp32", "llama.cpp fp32", 1.1),
    ("int8_decode_over_ctranslate2", "decode", "ours int8", "CTranslate2 int8", 1.25),
    ("int4_decode_over_llama_cpp", "decode", "ours int4", "llama.cpp int4", 1.15),
    ("int8_prefill_over_ctranslate2", "prefill", "ours int8", "CTranslate2 int8", 1.3),
)


LIMITS = "limits"
BATCHED = f" x{BATCH}"  # behind the name of ours
REFERENCES = ("transformers fp32", "ours fp32")  # whose tokens the others' are compared with


def turns(contestant: Contestant, shape: Shape, folder: Path) -> Turn:
    """A contestant that is asked for prompts and answers Generation of the first; ours of all."""
    generate = contestant.build(shape, folder, contestant.precision)
    sizes = (1, BATCH) if contestant.build is ours else (1,)
    return lambda prompts: [generate(prompts[:size]) for size in sizes]


def chosen(words: Sequence[str]) -> dict[str, Contestant]:
    """The contestants whose names contain one of the words, if their libraries are here."""
    found = {}
    for name, contestant in CONTESTANTS.items():
        if not any(word.strip().lower() in name.lower() for word in words):
            continue
        if peer_models.is_installed(contestant.module):
            found[name] = contestant
        else:
            print(f"{name} is left out: {contestant.module} is missing; {peer_models.INSTALL}")
    return found


def compete(
    shape: Shape, folder: Path, contestants: Mapping[str, Contestant], rounds: int
) -> tuple[dict[str, list[Generation]], list[Limits]]:
    """Of every round: each contestant's turn, ours with a batch as one of its own; the limits."""
    builds = {name: partial(turns, it, shape, folder) for name, it in contestants.items()}
    started = Contestants({**builds, LIMITS: measure_limits})
    draw = random.Random(1234)
    found: dict[str, list[Generation]] = {}
    limits = []
    with log.progress(total=rounds + 1, desc=shape.name, unit=" rounds") as bar:
        for i in range(rounds + 1):  # round 0 warms up
            prompts = [draw.choices(range(1, shape.vocabulary), k=PROMPT) for _ in range(BATCH)]
            answers = started.round(i, prompts)
            bar.update(1)
            if i == 0:
                continue
            limits.append(answers.pop(LIMITS)[1])
            for name, (_, generations) in answers.items():
                for generation, suffix in zip(generations, ("", BATCHED), strict=False):
                    found.setdefault(name + suffix, []).append(generation)
    started.end()
    return found, limits


def ratios(found: Mapping[str, list[Generation]]) -> dict[str, list[float]]:
    """By figure, of every round; of what took part."""
    compared = {}
    pairs = [(figure, what, a, b) for figure, what, a, b, _ in RATIOS]
    for precision in BITS:
        name, figure = f"ours {precision}", "batch16{}_over_single"
        if precision != "fp32":
            figure = f"{precision}_{figure}"
        pairs.append((figure.format(""), "decode", name + BATCHED, name))
        pairs.append((figure.format("_total"), "total", name + BATCHED, name))
    for figure, what, first, second in pairs:
        if first in found and second in found:
            turns = zip(found[first], found[second], strict=True)
            compared[figure] = [getattr(a, what) / getattr(b, what) for a, b in turns]
    return compared


def shares(
    shape: Shape, precision: str, turns: Sequence[Generation], limits: Sequence[Limits]
) -> tuple[float, float]:
    """Of prefill in the rate of matrix products, and of decode in the rate of reading memory."""
    operations, size = 2 * shape.products, shape.read * BITS[precision] / 8
    prefill, decode = [], []
    for turn, limit in zip(turns, limits, strict=True):
        rate = limit.fp32 if precision == "fp32" else limit.int8
        prefill.append(turn.prefill * operations / rate)
        decode.append(turn.decode * size / limit.read)
    return statistics.median(prefill), statistics.median(decode)


def agreement(name: str, found: Mapping[str, list[Generation]]) -> str:
    """How many of the first tokens are the reference's, in the round where they are fewest."""
    if name.endswith(BATCHED):
        reference = name.removesuffix(BATCHED)
    else:
        reference = next((known for known in REFERENCES if known in found), name)
    if name == reference:
        return ""
    least = NEW
    for turn, other in zip(found[name], found[reference], strict=True):
        pairs = zip(turn.tokens[0], other.tokens[0], strict=True)
        least = min(least, next((i for i, (a, b) in enumerate(pairs) if a != b), NEW))
    note = f"as {reference}: {least if least < NEW else 'all'}"
    if least < AGREE and name.removesuffix(BATCHED).endswith("fp32"):
        note += "  IT COMPUTES SOMETHING ELSE"
    return note


def report(
    shape: Shape, found: Mapping[str, list[Generation]], limits: Sequence[Limits]
) -> dict[str, float]:
    """Print the table and return the figures."""
    figures = {}
    print(
        f"{'tokens/s':24}{'prefill':>9}{'of limit':>10}{'decode':>9}{'of limit':>10}{'total':>9}"
        "   first tokens"
    )
    for name, turns in found.items():
        program, precision = name.removesuffix(BATCHED).split()
        prompt, decoded, total = (
            statistics.median(getattr(turn, what) for turn in turns)
            for what in ("prefill", "decode", "total")
        )
        prefill, decode = shares(shape, precision, turns, limits)
        batch = name.endswith(BATCHED)
        if program == "ours" and not batch:
            figures[f"{precision}_prefill_share_of_products"] = prefill
            figures[f"{precision}_decode_share_of_memory"] = decode
        print(
            f"{name:24}{prompt:9.1f}{prefill:10.1%}{decoded:9.1f}"
            f"{'' if batch else f'{decode:.1%}':>10}{total:9.1f}   {agreement(name, found)}"
        )
    read, fp32, int8 = (
        statistics.median(getattr(limit, what) for limit in limits) / 1e9
        for what in ("read", "fp32", "int8")
    )
    print(
        f"limits: reading {read:.1f} GB/s, products in fp32 {fp32:.0f} GFLOP/s, in int8 "
        f"{int8:.0f} GOP/s"
    )
    targets = {figure: f", target {target}" for figure, *_, target in RATIOS}
    for figure, values in ratios(found).items():
        figures[figure] = statistics.median(values)
        print(
            f"{figure:32}{figures[figure]:8.3f}   ({min(values):.2f} to {max(values):.2f}"
            f"{targets.get(figure, '')})"
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of the 410M one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--only", default="", metavar="WORDS", help="contestants with one of these")
    arguments = parser.parse_args()
    shape, rounds = (TINY, QUICK_ROUNDS) if arguments.quick else (SHAPE_410M, FULL_ROUNDS)
    contestants = chosen(arguments.only.split(","))
    if not contestants:
        parser.error(f"--only {arguments.only}: the contestants are {', '.join(CONTESTANTS)}")

    with tempfile.TemporaryDirectory() as folder:
        needed: dict[str, list[str]] = {"ctranslate2": [], "llama_cpp": []}
        for contestant in contestants.values():
            needed.setdefault(contestant.module, []).append(contestant.precision)
        peer_models.write(
            shape, Path(folder), ctranslate2=needed["ctranslate2"], gguf=needed["llama_cpp"]
        )
        found, limits = compete(shape, Path(folder), contestants, rounds)
    print(
        f"{shape.name}: {PROMPT} tokens of prompt, {NEW} new ones, greedy, {THREADS} threads; "
        f"medians of {rounds} rounds"
    )
    figures = report(shape, found, limits)
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
