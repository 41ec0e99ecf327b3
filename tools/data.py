#!/usr/bin/env python3
"""Look at training data: what the model sees at a step, how much there is; and merge datasets.

    python tools/data.py show configs/demo.yml --step 100
    python tools/data.py show configs/20B.yml --step 100 -n 64 --rank 3 --micro-batch 0
    python tools/data.py count data/pile_text_document data/code_text_document
    python tools/data.py merge --input data/part1 data/part2 --output-prefix data/all_text_document

A dataset is named by its PREFIX, the path of its .bin and .idx files without the ending.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.cluster.main import exit_status
from neox.errors import ConfigError

if TYPE_CHECKING:
    from neox.config import NeoXConfig
    from neox.data.loaders import Loader
    from neox.tokenizer import Tokenizer

# torch, numpy and the data are imported inside the functions: -h comes at once.

PADDING, MASKED, LEARNT = "padding", "masked", "learnt"


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    # What is half written goes away with a cancelled job.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    log.quiet_third_parties()
    return exit_status(lambda: options.run(options))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> Any:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        return made.add_argument

    add = command("show", run_show, "print the samples of a training step as the model sees them")
    add("config", nargs="+", type=Path, metavar="CONFIG", help="YAML files, as for train.py")
    add("-d", "--conf_dir", type=Path, metavar="DIR", help="folder that they are relative to")
    add("--step", type=int, required=True, metavar="N", help="from 1, as the log counts them")
    add("-n", "--rows", type=int, default=2, metavar="N", help="samples to print (default: 2)")
    add("--rank", type=int, metavar="R", help="only what this rank reads")
    add("--micro-batch", type=int, metavar="M", help="only this one of the step's, from 0")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")

    add = command("merge", run_merge, "make one dataset of several, labels included")
    add("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, or folders of them")
    add("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")

    add = command("count", run_count, "count documents and tokens")
    add("prefix", nargs="+", metavar="PREFIX")
    return parser


def run_show(options: argparse.Namespace) -> int:
    from neox.cluster.launch import find_devices
    from neox.config import Override, load_config, parse_set
    from neox.data.loaders import build_loaders, settle_iterations
    from neox.parallel.groups import ProcessGroups
    from neox.tokenizer import build_tokenizer
    from neox.train.examples import tokenize_examples

    overrides = {key: Override(value, "--set") for key, value in map(parse_set, options.set)}
    config = load_config(
        options.config,
        overrides,
        conf_dir=options.conf_dir,
        purpose="train",
        world_size=find_devices,
    )
    tokenizer = build_tokenizer(config)
    alone = ProcessGroups.single()
    config = tokenize_examples(config, alone, tokenizer)
    config = settle_iterations(config, alone, vocab_size=tokenizer.vocab_size)
    check_choice("--step", options.step, 1, config.train_iters)
    # One replica alone reads what several do, one after the other: see `places`.
    loaders = build_loaders(config, alone, 0, tokenizer.eod, vocab_size=tokenizer.vocab_size)
    chosen = list(places(config, options.step, options.rank, options.micro_batch))
    micro, dp = config.train_micro_batch_size_per_gpu, config.dp
    print(
        f"step {options.step} of {config.train_iters}: {config.train_batch_size} samples = {micro} "
        f"in a micro-batch x {config.gradient_accumulation_steps} accumulated x {dp} "
        f"replica{'s' * (dp > 1)}"
    )
    assert loaders.train is not None
    rows = [(*place, row) for place in chosen for row in range(micro)]
    for number, title, row in rows[: options.rows]:
        print(f"\n{title}, row {row}")
        show_row(loaders.train, number, row, tokenizer)
    if len(rows) > options.rows:
        print(f"\n{len(rows) - options.rows} more: -n {len(rows)}")
    return 0


def check_choice(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: choose one from {low} to {high}")


def places(
    config: NeoXConfig, step: int, rank: int | None, micro_batch: int | None
) -> Iterator[tuple[int, str]]:
    """(number, title) of the step's micro-batches, as a loader of a single replica numbers them.

    Micro-batch m of replica r of dp is that loader's m * dp + r.
    """
    from neox.parallel.topology import Topology

    steps, dp = config.gradient_accumulation_steps, config.dp
    if micro_batch is not None:
        check_choice("--micro-batch", micro_batch, 0, steps - 1)
    replica = None
    if rank is not None:
        check_choice("--rank", rank, 0, config.world_size - 1)
        replica = Topology(pp=config.pp, dp=dp, tp=config.tp).coordinate(rank).dp
    for m in range(steps):
        for r in range(dp):
            if micro_batch in (None, m) and replica in (None, r):
                number = ((step - 1) * steps + m) * dp + r
                yield number, f"micro-batch {m}, replica {r}"


def show_row(loader: Loader, number: int, row: int, tokenizer: Tokenizer) -> None:
    """Print a sample: whence it comes, then its tokens in runs that count as labels or do not."""
    from neox.data.finetune import place_of

    batch = loader.read(number)
    origins = loader.origins(number)[row]
    for part in origins:
        place = place_of(part.prefix, part.document)
        source = place or f"{part.prefix}, document {part.document}"
        print(f"  {source}, tokens {part.start} to {part.stop}")
    tokens, labels, mask = (tensor[row].tolist() for tensor in batch)
    filled = sum(part.stop - part.start for part in origins)
    # The first token is nobody's label; the last label is no input.
    kinds = [MASKED, *(LEARNT if counts else MASKED for counts in mask)]
    ids = [*tokens, labels[-1]]
    kinds[filled:] = [PADDING] * len(kinds[filled:])
    if kinds[-1] == MASKED:  # what it was is not told to the model
        del kinds[-1], ids[-1]
    runs = itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0])
    for kind, pairs in runs:
        run = [token for _, token in pairs]
        print(f"  {kind} {len(run)}")
        if kind != PADDING:
            print(indented("ids   ", " ".join(map(str, run))))
            print(indented("text  ", readable(run, tokenizer)))
    told = zip(tokens[1:], labels, mask, strict=False)
    others = [f"{label} for {token}" for token, label, counts in told if counts and label != token]
    if others:
        print(indented("labels that are not the text's tokens: ", ", ".join(others)))


def indented(title: str, text: str) -> str:
    return textwrap.fill(
        text, 100, initial_indent=f"    {title}", subsequent_indent=" " * 10, drop_whitespace=False
    )


def readable(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text, quoted, with the ends of documents marked."""
    parts = []
    for is_end, run in itertools.groupby(ids, key=lambda token: token == tokenizer.eod):
        run = list(run)
        parts.append("<end of document>" * len(run) if is_end else tokenizer.detokenize(run))
    return json.dumps("".join(parts), ensure_ascii=False)


def run_merge(options: argparse.Namespace) -> int:
    from neox.data.merge import merge

    done = merge(options.input, options.output_prefix)
    print(f"{done.documents:,} documents, {done.tokens:,} tokens")
    print(f"wrote {done.prefix}.bin and .idx")
    if done.labels is not None:
        print(f"wrote {done.labels}.bin and .idx (labels)")
    return 0


def run_count(options: argparse.Namespace) -> int:
    from neox.data.count import count

    found = []
    for prefix in options.prefix:
        counts = count(prefix)
        found.append(counts)
        print(counts.prefix)
        print(
            f"  documents    {counts.documents:,}{f', {counts.empty:,} empty' * (counts.empty > 0)}"
        )
        print(f"  tokens       {counts.tokens:,}, stored as {counts.dtype}")
        print(f"  largest id   {counts.largest_id:,}")
        if counts.masked:
            print(f"  masked       {counts.masked:,} ({counts.masked / counts.tokens:.1%})")
        print(
            f"  lengths      {counts.shortest:,} to {counts.longest:,}, mean "
            f"{counts.tokens / counts.documents:,.1f}"
        )
        shares = ", ".join(f"{p} %: {length:,}" for p, length in counts.percentiles.items())
        print(f"  percentiles  {shares}")
    if len(found) > 1:
        documents = sum(counts.documents for counts in found)
        tokens = sum(counts.tokens for counts in found)
        print(f"together {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
