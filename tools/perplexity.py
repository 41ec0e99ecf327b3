#!/usr/bin/env python3
"""Say what weights of fewer bits cost: a text's perplexity with each, side by side.

    python tools/perplexity.py configs/demo.yml --text demo/corpus.jsonl
    python tools/perplexity.py configs/20B.yml --text wiki.txt --quantize none,int4 --json cost.json

Perplexity is exp(-sum(log p(token | what is before it)) / tokens). A document begins behind an
end-of-document token. The model sees it in windows of seq_length tokens, of which the first scores
all its tokens and each later one the last STRIDE, so that every token is scored once and, from the
second window on, with at least seq_length - STRIDE tokens before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import atomic, log
from neox.cluster.main import exit_status
from neox.config import NeoXConfig, Override, change, load_config, parse_set
from neox.config.fields import keys_of
from neox.errors import ConfigError, DataError

if TYPE_CHECKING:
    from neox.evaluation.scoring import Pair
    from neox.tokenizer import Tokenizer

WAYS = typing.get_args(keys_of(NeoXConfig)["quantize"].type)
ONE_PROCESS = {"model_parallel_size": Override(1, "derived")}
ONE_PROCESS |= {"pipe_parallel_size": Override(1, "derived")}
COLUMNS = ("quantize", "perplexity", "change", "weights (MB)", "tokens/s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", nargs="+", type=Path, metavar="CONFIG", help="YAML files, as deepy.py takes them")
    add("--text", required=True, metavar="FILE", help="what preprocess_data.py reads, or a folder")
    add("--jsonl-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    help = (
        f"with commas between; the others are compared with the first (default: {','.join(WAYS)})"
    )
    add("--quantize", default=",".join(WAYS), metavar="WAYS", help=help)
    add("--stride", type=int, metavar="N", help="default: half of seq_length")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    add("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    options = parser.parse_args(arguments)
    log.quiet_third_parties()
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    configs = load_configs(options)
    length = configs[0].seq_length
    stride = length // 2 or 1 if options.stride is None else options.stride
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride is {stride}, but it must be from 1 to seq_length, {length}.")

    from neox.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(configs[0])
    documents, pairs = read(options.text, options.jsonl_keys, tokenizer, length, stride)
    tokens = sum(len(continuation) for _, continuation in pairs)
    print(
        f"{options.text}: {tokens:,} tokens in {documents:,} documents; {len(pairs):,} windows of "
        f"{length} tokens, stride {stride}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for config in configs:
        rows.append(score(config, pairs, tokenizer))
        rows[-1]["change_percent"] = 100 * (rows[-1]["perplexity"] / rows[0]["perplexity"] - 1)
    print(table(rows))
    if options.json:
        result = {"text": options.text, "load": configs[0].load, "documents": documents}
        result |= {"tokens": tokens, "seq_length": length, "stride": stride, "results": rows}
        try:
            atomic.write_text(options.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {options.json}: {error.strerror}.") from None
    return 0


def load_configs(options: argparse.Namespace) -> list[NeoXConfig]:
    """The configuration with each of the ways. Whatever is wrong with any is said at once."""
    ways = [way for way in options.quantize.split(",") if way]
    if not ways:
        raise ConfigError(f"--quantize names none of {', '.join(WAYS)}.")
    overrides = {key: Override(value, "--set") for key, value in map(parse_set, options.set)}
    first = Override(ways[0], "--quantize")
    config = load_config(
        options.config,
        ONE_PROCESS | overrides | {"quantize": first},
        purpose="evaluate",
        world_size=1,
    )
    return [config, *(change(config, "quantize", way, "evaluate") for way in ways[1:])]


def read(
    text: str, keys: Sequence[str], tokenizer: Tokenizer, length: int, stride: int
) -> tuple[int, list[Pair]]:
    """How many documents there are, and their windows. DataError when there is nothing to score."""
    from neox.data.corpus import find_files, read_chunks
    from neox.evaluation.perplexity import windows

    documents = 0
    pairs: list[Pair] = []
    for chunk in read_chunks(find_files([text])):
        for record in chunk.records():
            for document in record.texts(keys):
                documents += 1
                pairs += windows(tokenizer.tokenize(document), tokenizer.eod, length, stride)
    if not pairs:
        raise DataError(f"{text} holds no text to score: {documents} documents, all empty.")
    return documents, pairs


def score(config: NeoXConfig, pairs: Sequence[Pair], tokenizer: Tokenizer) -> dict[str, Any]:
    """Load the model as `config` says and measure it; a row of the results."""
    import torch

    from neox.evaluation.perplexity import measure
    from neox.inference.load import load_model
    from neox.parallel.groups import ProcessGroups

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config, ProcessGroups.single(device), tokens=tokenizer.vocab_size)
    with log.progress(total=0, desc=f"{config.quantize}", unit=" windows") as bar:
        found = measure(model, pairs, bar)
    return {
        "quantize": config.quantize,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "weight_bytes": model.weight_bytes,
        "tokens_per_second": found.tokens_per_second,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [COLUMNS]
    for number, row in enumerate(rows):
        change = f"{row['change_percent']:+.3f} %" if number else ""
        size, rate = f"{row['weight_bytes'] / 1e6:,.1f}", f"{row['tokens_per_second']:,.0f}"
        lines.append((row["quantize"], f"{row['perplexity']:.4f}", change, size, rate))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if at == 0 else '>'}{widths[at]}}" for at, cell in enumerate(line))
        for line in lines
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
