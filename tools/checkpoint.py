#!/usr/bin/env python3
"""Look at checkpoints, check, compare, convert, merge, reshard and make them; compute their logits.

    python tools/checkpoint.py inspect 20B_checkpoints
    python tools/checkpoint.py verify 20B_checkpoints
    python tools/checkpoint.py diff checkpoints/run1 checkpoints/run2 --iteration 5000
    python tools/checkpoint.py convert 20B_checkpoints --to transformers --output 20B_hf
    python tools/checkpoint.py convert pythia-1b --to neox --model_parallel_size 2 --output pythia
    python tools/checkpoint.py merge --load pythia --adapter lora/run1 --output pythia_merged
    python tools/checkpoint.py reshard 20B_checkpoints --model_parallel_size 1 --output 20B_mp1
    python tools/checkpoint.py synthesize --config configs/20B.yml --num_layers 8 --output slice
    python tools/checkpoint.py logits --config configs/20B.yml --tokens ids.npz --output out.npz

A FOLDER holds `latest` and the global_step folders, or is one of those, or is a transformers
folder. Where a command has to know the architecture, it is read from the checkpoint: from its
manifest or its configs folder; --config names the YAML files where neither is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.cluster.main import exit_status
from neox.config import ModelConfig, NeoXConfig, Override, from_dict, load_config, parse_set
from neox.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from neox.checkpoint.neox import Checkpoint
    from neox.tokenizer import Tokenizer

# torch is imported inside the functions: `logits` sets up each process before it is.

PRECISIONS = {"fp16": "float16", "bfloat16": "bfloat16", "fp32": "float32"}
TOKENS_OF_20B = 50277
FILES: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "YAML"}
ADAPTER: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
WHERE_IT_IS_NOT_TOLD = "where the checkpoint cannot tell its architecture, or its tokenizer"

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    log.quiet_third_parties()
    return exit_status(lambda: options.run(options))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    iteration, source, output, override, dtype = (
        argparse.ArgumentParser(add_help=False) for _ in range(5)
    )
    iteration.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    source.add_argument("folder", type=Path, metavar="FOLDER")
    output.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    output.add_argument("--model_parallel_size", type=_count, metavar="N", help="shards to write")
    override.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable"
    )

    dtype.add_argument("--dtype", choices=PRECISIONS, help="default: the checkpoint's")

    def command(name: str, run: Run, summary: str, *parents: argparse.ArgumentParser) -> Any:
        made = commands.add_parser(name, help=summary, description=summary, parents=parents)
        made.set_defaults(run=run)
        return made.add_argument

    add = command("inspect", run_inspect, "tell what a checkpoint is", source, iteration)
    add("--tensors", action="store_true", help="list every tensor")
    add("--values", action="store_true", help="... with min, max, mean and std")
    add("--json", action="store_true", help="write JSON")

    command("verify", run_verify, "read every file, tell what is damaged", source, iteration)

    add = command("diff", run_diff, "compare: status 0 same, 1 different, 2 trouble", iteration)
    add("first", type=Path, metavar="FOLDER")
    add("second", type=Path, metavar="FOLDER")
    add("--config", **FILES, help=WHERE_IT_IS_NOT_TOLD)

    add = command("convert", run_convert, "change the format", source, iteration, output, dtype)
    add("--to", choices=("transformers", "neox"), required=True)
    add("--adapter", **ADAPTER, help="LoRA adapters to merge into the weights")
    add("--config", **FILES, help=WHERE_IT_IS_NOT_TOLD)

    summary = "write NeoX's layer files with LoRA adapters in the weights"
    add = command("merge", run_convert, summary, iteration, output, dtype)
    add("--load", dest="folder", type=Path, required=True, metavar="FOLDER", help="the base")
    add("--adapter", **ADAPTER, required=True, help="in PEFT's format, or checkpoints of a run")
    add("--config", **FILES, help=WHERE_IT_IS_NOT_TOLD)
    commands.choices["merge"].set_defaults(to="neox")

    add = command("reshard", run_reshard, "change the number of shards", source, iteration, output)
    add("--config", **FILES, help=WHERE_IT_IS_NOT_TOLD)
    add("--padded_vocab_size", type=_count, metavar="V", help="rows to trim or pad to")

    add = command("synthesize", run_synthesize, "write random weights", output, override)
    add("--config", **FILES, required=True)
    for key in ("num_layers", "hidden_size", "num_attention_heads", "seed"):
        add(f"--{key}", type=int, metavar="N", help="default: the configuration's")
    add("--dtype", choices=PRECISIONS, help="default: the configuration's")
    help = f"before padding; default: the tokenizer's if its file is there, else {TOKENS_OF_20B}"
    add("--vocab_size", type=_count, metavar="TOKENS", help=help)
    help = "20B's names and buffers (dense_h_to_4h, inv_freq), or those of today's upstream"
    add("--legacy_names", action=argparse.BooleanOptionalAction, default=True, help=help)

    summary = "logits in fp32 for given token ids"
    add = command("logits", run_logits, summary, iteration, override)
    add("--config", **FILES, required=True)
    add("--tokens", required=True, metavar="NPZ", help="token ids: integers [batch, length]")
    add("--output", required=True, metavar="NPZ", help="`logits`, float32 [batch, length, rows]")
    add("--load", metavar="FOLDER", help="default: the configuration's")
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_count.__name__ = "count"  # argparse shows it: invalid count value: '0'


def run_inspect(options: argparse.Namespace) -> int:
    from neox.checkpoint.neox import Checkpoint
    from neox.checkpoint.summary import describe, summarize, table, tensors_of, to_json

    checkpoint = Checkpoint.open(options.folder, options.iteration)
    summary = summarize(checkpoint)
    tensors = None
    if options.tensors or options.values:
        tensors = list(tensors_of(checkpoint, values=options.values))
    if options.json:
        print(json.dumps(to_json(summary, tensors), indent=2))
    else:
        print(describe(summary))
        if tensors is not None:
            print(f"\n{table(tensors)}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from neox.checkpoint.folders import resolve
    from neox.checkpoint.verify import verify
    from neox.config.hf import is_transformers

    folder, found = options.folder, "every file is as it was written"
    if is_transformers(folder):
        found = "every file is whole; safetensors files hold no checksums"
    else:
        folder = resolve(folder, options.iteration)
    problems = verify(folder)
    for problem in problems or [f"{folder}: {found}"]:
        print(problem)
    return 2 if problems else 0


def run_diff(options: argparse.Namespace) -> int:
    from neox.checkpoint.compare import compare, compare_architectures, conclusion
    from neox.checkpoint.neox import Checkpoint

    first = Checkpoint.open(options.first, options.iteration)
    second = Checkpoint.open(options.second, options.iteration)
    configs = configs_of(first, second, options.config)
    first = Checkpoint.open(options.first, options.iteration, configs[0])
    second = Checkpoint.open(options.second, options.iteration, configs[1])
    contradictions = compare_architectures(first, second)
    for contradiction in contradictions:
        log.info(f"architecture: {contradiction}")
    found = []
    for comparison in compare(first, configs[0], second, configs[1]):
        found.append(comparison)
        if not comparison.verdict.is_same:
            log.info(str(comparison))
    log.info(conclusion(found))
    is_same = not contradictions and all(each.verdict.is_same for each in found)
    return 0 if is_same else 1


def run_convert(options: argparse.Namespace) -> int:
    from neox.checkpoint.hf.export import export
    from neox.checkpoint.hf.importing import import_folder
    from neox.checkpoint.neox import Checkpoint
    from neox.checkpoint.peft import with_adapter
    from neox.checkpoint.reshard import choose_rows, reshard
    from neox.config.hf import is_transformers
    from neox.config.mesh import is_mesh
    from neox.model.gpt import torch_dtype

    dtype = torch_dtype(PRECISIONS[options.dtype]) if options.dtype else None
    tp, output, adapter = options.model_parallel_size, options.output, options.adapter
    if options.to == "neox" and (is_transformers(options.folder) or is_mesh(options.folder)):
        if options.iteration is not None or (options.config and is_transformers(options.folder)):
            raise ConfigError("a transformers folder takes neither --config nor --iteration.")
        config = None
        if options.config:
            config = config_at(Checkpoint.open(options.folder), options.config, tp or 1)
        folder = import_folder(
            options.folder, output, tp=tp or 1, dtype=dtype, config=config, adapter=adapter
        )
        log.info(f"{folder}: try ./deepy.py generate.py {folder}/configs/hf.yml")
        return 0
    checkpoint = Checkpoint.open(options.folder, options.iteration)
    if options.to == "neox":
        config = config_at(checkpoint, options.config, tp or checkpoint.tp)
        checkpoint = Checkpoint.open(options.folder, options.iteration, config)
        rows = choose_rows(checkpoint, config, None, tokenizer_size(config))
        if adapter is not None:
            checkpoint = with_adapter(checkpoint, config, adapter)
        folder = reshard(
            checkpoint,
            output,
            config,
            rows,
            todays_names=True,
            dtype=dtype,
            as_recorded=adapter is None,
        )
        log.info(f"{folder}: model_parallel_size {config.tp}, today's names")
        return 0
    if tp is not None:
        raise ConfigError("--model_parallel_size: a transformers folder is whole; leave it out.")
    config = config_at(checkpoint, options.config, 1)
    checkpoint = Checkpoint.open(options.folder, options.iteration, config)
    tokenizer = find_tokenizer(config)
    if tokenizer is None:
        log.warning(f"{output} gets no tokenizer: no vocab_file is known that is there (--config)")
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, config, adapter)
    export(checkpoint, config, output, dtype=dtype, tokenizer=tokenizer)
    log.info(f"{output}: for transformers' from_pretrained")
    return 0


def run_reshard(options: argparse.Namespace) -> int:
    from neox.checkpoint.neox import Checkpoint
    from neox.checkpoint.reshard import choose_rows, reshard
    from neox.config.hf import is_transformers

    if options.model_parallel_size is None:
        raise ConfigError("--model_parallel_size: say how many shards there are to be.")
    if is_transformers(options.folder):
        raise ConfigError(
            f"{options.folder} is a transformers folder, without shards: use convert --to neox."
        )
    checkpoint = Checkpoint.open(options.folder, options.iteration)
    config = config_at(checkpoint, options.config, options.model_parallel_size)
    checkpoint = Checkpoint.open(options.folder, options.iteration, config)
    rows = choose_rows(checkpoint, config, options.padded_vocab_size, tokenizer_size(config))
    folder = reshard(checkpoint, options.output, config, rows)
    log.info(f"{folder}: model_parallel_size {config.tp}, from {checkpoint.tp}")
    return 0


def run_synthesize(options: argparse.Namespace) -> int:
    from neox.checkpoint.synthesize import synthesize
    from neox.model.layout import pad_vocab_size

    keys = ("num_layers", "hidden_size", "num_attention_heads", "seed", "model_parallel_size")
    given = {key: getattr(options, key) for key in keys} | {"precision": options.dtype}
    given["pipe_parallel_size"] = 1  # files are the same at any
    config = load_config(
        options.config,
        overrides(options, {key: value for key, value in given.items() if value is not None}),
        check_files=False,
    )
    tokens = options.vocab_size or tokenizer_size(config)
    if tokens is None:
        tokens = TOKENS_OF_20B
        log.info(f"vocabulary: {tokens} tokens, as 20B's (--vocab_size); there is no tokenizer")
    rows = pad_vocab_size(tokens, config.make_vocab_size_divisible_by, config.tp)
    folder = synthesize(options.output, config, rows, legacy_names=options.legacy_names)
    log.info(f"{folder}: {config.num_layers} layers, {rows} rows, model_parallel_size {config.tp}")
    return 0


def run_logits(options: argparse.Namespace) -> int:
    from neox.cluster.launch import find_devices, launch, make_plan

    given = {
        "load": options.load,
        "iteration": options.iteration,
        "sample_input_file": options.tokens,
        "sample_output_file": options.output,
        "precision": "fp32",  # whatever the model was trained in; --set precision=fp16 halves it
    }
    config = load_config(
        options.config,
        overrides(options, {key: value for key, value in given.items() if value is not None}),
        purpose="logits",
        world_size=find_devices,
    )
    status = launch("logits", None, config, make_plan(config))
    if status == 0:
        log.info(f"{options.output}: logits at tp {config.tp} x pp {config.pp}")
    return status


def overrides(options: argparse.Namespace, flags: Mapping[str, Any]) -> dict[str, Override]:
    """What the flags and, over them, --set make of the configuration."""
    found = {key: Override(value, _FLAGS.get(key, f"--{key}")) for key, value in flags.items()}
    for assignment in options.set:
        key, value = parse_set(assignment)
        found[key] = Override(value, "--set")
    return found


_FLAGS = {
    "precision": "--dtype",
    "sample_input_file": "--tokens",
    "sample_output_file": "--output",
}


def config_at(checkpoint: Checkpoint, files: Sequence[Path] | None, tp: int) -> NeoXConfig:
    """The checkpoint's architecture at `tp` shards: from `files`, or from itself."""
    from neox.checkpoint.architecture import check_architecture, describe
    from neox.checkpoint.evidence import kept_values

    if files:
        grid = {"model_parallel_size": tp, "pipe_parallel_size": 1}
        flags = {key: Override(value, f"--{key}") for key, value in grid.items()}
        config = load_config(files, flags, check_files=False)
        check_architecture(config, checkpoint)
        return config
    values = describe(checkpoint)
    values |= kept_values(checkpoint, ("tokenizer_type", "vocab_file", "merge_file"))
    length = values["max_position_embeddings"]
    return from_dict({**values, "seq_length": length, "model_parallel_size": tp}, world_size=tp)


def configs_of(
    first: Checkpoint, second: Checkpoint, files: Sequence[Path] | None
) -> tuple[ModelConfig, ModelConfig]:
    """The architectures of two checkpoints; one that cannot tell its own is taken to be as the
    other."""
    from neox.checkpoint.architecture import config_of

    if files:
        return config_at(first, files, 1), config_at(second, files, 1)
    try:
        one = config_of(first)
    except CheckpointError:
        other = config_of(second)
        return other, other
    try:
        return one, config_of(second)
    except CheckpointError:
        return one, one


def find_tokenizer(config: NeoXConfig) -> Tokenizer | None:
    """The configuration's; None where it names no file, or one that is not there."""
    from neox.tokenizer import build_tokenizer

    if config.vocab_file is None or not Path(config.vocab_file).exists():
        return None
    return build_tokenizer(config)


def tokenizer_size(config: NeoXConfig) -> int | None:
    tokenizer = find_tokenizer(config)
    return None if tokenizer is None else tokenizer.vocab_size


if __name__ == "__main__":
    sys.exit(main())
