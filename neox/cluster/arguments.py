"""The grammar of deepy.py's command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import neox
from neox.config import NeoXConfig, Override
from neox.config.load import Purpose, parse_set
from neox.config.source import SUFFIXES
from neox.errors import ConfigError

REPOSITORY = Path(neox.__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "configs" / "20B.yml"
ENTRY_POINTS: dict[str, Purpose] = {
    "train.py": "train",
    "generate.py": "generate",
    "evaluate.py": "evaluate",
    "eval.py": "evaluate",
    "serve.py": "serve",
    "plan.py": "plan",
}

_DESCRIPTION = """\
Train, generate from, evaluate, serve or plan a GPT-NeoX model described by NeoX YAML files."""

_EPILOG = """\
USER_SCRIPT is train.py, generate.py, evaluate.py (also eval.py), serve.py or plan.py, or the path
of your own script, which finds its configuration through the variable NEOX_CONFIG_FILE.
CONF may do without its suffix: 125M is 125M.yml. Without any CONF, configs/20B.yml is used.

examples:
  ./deepy.py train.py -d configs 125M.yml local_setup.yml
  ./deepy.py train.py configs/demo.yml --set train_iters=100 --set optimizer.params.lr=6e-4
  ./deepy.py generate.py configs/20B.yml                        unconditional
  ./deepy.py generate.py configs/20B.yml -i prompts.txt -o samples.jsonl
  ./deepy.py evaluate.py configs/20B.yml --eval_tasks lambada piqa --num_fewshot 5
  ./deepy.py serve.py configs/20B.yml                           OpenAI's API, and a page
  ./deepy.py plan.py configs/20B.yml --devices 96 --search      memory, messages, other grids
  ./deepy.py train.py configs/20B.yml --dry_run                 the configuration, nothing runs
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A command line, understood."""

    entry_point: Purpose | None  # a module of neox.entrypoints ...
    script: Path | None  # ... or the user's own script
    conf_dir: Path | None = None  # what the files are relative to
    files: tuple[Path, ...] = ()
    overrides: dict[str, Override] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    devices: int | None = None  # of a plan
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else it is asked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (./deepy.py -h lists what there is)")


def parse(argv: Sequence[str]) -> Arguments:
    """Understand the words after `deepy.py`. ConfigError for wrong usage; -h and --version exit."""
    parser = _build_parser()
    # Intermixed: configuration files may stand before, between and after flags.
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError(_explain_unknown(parser, unknown[0]))
    if given.autotuning:
        raise ConfigError(
            "--autotuning: DeepSpeed's autotuner is not supported, since it starts processes by "
            "itself; set train_micro_batch_size_per_gpu and zero_optimization instead"
        )
    tasks, confs = _split_tasks(given.eval_tasks or [])
    if given.eval_tasks and not tasks:
        raise ConfigError("--eval_tasks: name at least one task, for example --eval_tasks lambada")
    entry_point, script = _user_script(given.user_script)
    return Arguments(
        entry_point,
        script,
        conf_dir=Path(given.conf_dir) if given.conf_dir else None,
        files=tuple(map(Path, [*given.conf_file, *confs])),
        overrides=_overrides(given, tasks),
        dry_run=given.dry_run,
        devices=given.devices,
        plan=_plan_options(given, entry_point),
    )


def _plan_options(given: argparse.Namespace, entry_point: Purpose | None) -> dict[str, Any]:
    """What plan.py is asked. ConfigError when another entry point is, or devices are too few."""
    names = ("cluster", "search", "vocab_size", "json", "picture")
    asked = [n for n in (*names, "devices") if getattr(given, n) not in (None, False)]
    if asked and entry_point != "plan":
        raise ConfigError(f"--{asked[0]} is for plan.py: ./deepy.py plan.py CONF --{asked[0]} ...")
    if given.devices is not None and given.devices < 1:
        raise ConfigError(f"--devices is {given.devices}, but a run has one or more.")
    return {name: getattr(given, name) for name in names} if entry_point == "plan" else {}


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="deepy.py",
        usage="deepy.py USER_SCRIPT [-d DIR] CONF [CONF ...] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("user_script", metavar="USER_SCRIPT", help="what to run")
    add("conf_file", metavar="CONF", nargs="*", default=[], help="configuration files, merged")
    add("-d", "--conf_dir", metavar="DIR", help="folder that the CONF names are relative to")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=("override one key (repeatable); dots reach into blocks: optimizer.params.lr=6e-4"),
    )
    add(
        "--dry_run",
        action="store_true",
        help=("print the effective configuration and where each value comes from; run nothing"),
    )
    add("--iteration", metavar="N", type=int, help="checkpoint to load (default: the latest)")
    add("-H", "--hostfile", metavar="FILE", help="hosts and their slots, one 'host slots=N' a line")

    train = parser.add_argument_group("train.py")
    train.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        help="after a failure go on from the newest checkpoint, up to N times (needs save)",
    )

    generate = parser.add_argument_group("generate.py")
    add = generate.add_argument
    add("-i", "--sample_input_file", metavar="FILE", help="prompts to continue")
    add("-o", "--sample_output_file", metavar="FILE", help="where the samples go (JSON Lines)")

    evaluate = parser.add_argument_group("evaluate.py, and tasks in the validations of train.py")
    add = evaluate.add_argument
    add(
        "--eval_tasks",
        metavar="TASK",
        nargs="+",
        help=("tasks, up to the next flag; a word that ends in .yml, .yaml or .json is a CONF"),
    )
    add("--num_fewshot", metavar="N", type=int, help="solved examples in front of each document")
    add(
        "--limit",
        metavar="N",
        type=_number,
        help=("first N documents of each task, or a fraction below 1 (default: all)"),
    )
    add("--eval_results_prefix", metavar="PREFIX", help="prefix of the results file")
    add("--include_path", metavar="DIR", help="folder with task definitions of your own")
    add(
        "--batch_size",
        metavar="N",
        type=_batch_size,
        help="inputs of a forward pass (default: auto, as many as are fast)",
    )
    add("--apply_chat_template", action="store_true", default=None, help="prompts as conversations")
    add("--fewshot_as_multiturn", action="store_true", default=None, help="examples as turns")
    add("--system_instruction", metavar="TEXT", help="what prompts begin with")

    plan = parser.add_argument_group("plan.py")
    add = plan.add_argument
    add("--devices", metavar="N", type=int, help="ranks of the run (default: as few as it takes)")
    add("--cluster", metavar="FILE", help="what it is to run on: a YAML file, a name, or here")
    add("--search", action="store_true", help="every grid of as many devices, the best ones first")
    add("--vocab_size", metavar="N", type=int, help="tokens of a tokenizer that is not here")
    add("--json", metavar="FILE", help="where the plan goes as JSON, too")
    add("--picture", metavar="FILE", help="where the pipeline's schedule goes: .png, .svg, .pdf")

    wandb = parser.add_argument_group("Weights & Biases")
    add = wandb.add_argument
    add("--wandb_group", metavar="NAME", help="group of the run")
    add("--wandb_run_name", metavar="NAME", help="name of the run")
    add("--wandb_team", metavar="NAME", help="team (entity) of the run")

    parser.add_argument("--autotuning", choices=["tune", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"neox {neox.__version__}")
    return parser


# The keys that flags of their own set, and what the configuration names as their origin.
_FLAGS = {
    "iteration": "--iteration",
    "hostfile": "-H",
    "restarts": "--restarts",
    "sample_input_file": "-i",
    "sample_output_file": "-o",
    "num_fewshot": "--num_fewshot",
    "limit": "--limit",
    "eval_results_prefix": "--eval_results_prefix",
    "include_path": "--include_path",
    "apply_chat_template": "--apply_chat_template",
    "fewshot_as_multiturn": "--fewshot_as_multiturn",
    "system_instruction": "--system_instruction",
    "wandb_group": "--wandb_group",
    "wandb_run_name": "--wandb_run_name",
    "wandb_team": "--wandb_team",
}


def _overrides(given: argparse.Namespace, tasks: list[str]) -> dict[str, Override]:
    """The keys that the command line sets; --set comes last and wins over a flag."""
    overrides = {
        key: Override(getattr(given, key), flag)
        for key, flag in _FLAGS.items()
        if getattr(given, key) is not None
    }
    if given.batch_size is not None:
        size = None if given.batch_size == "auto" else given.batch_size
        overrides["eval_batch_size"] = Override(size, "--batch_size")
    if tasks:
        overrides["eval_tasks"] = Override(tasks, "--eval_tasks")
    for assignment in given.set:
        key, value = parse_set(assignment)
        overrides[key] = Override(value, "--set")
    return overrides


def _user_script(name: str) -> tuple[Purpose | None, Path | None]:
    if name in ENTRY_POINTS:
        return ENTRY_POINTS[name], None
    path = Path(name)
    if path.is_file():
        return None, path.resolve()
    near = difflib.get_close_matches(name, [*ENTRY_POINTS, *ENTRY_POINTS.values()], 1, cutoff=0.7)
    if near:
        raise ConfigError(f"no script {name}; did you mean {near[0].removesuffix('.py')}.py?")
    known = ", ".join(ENTRY_POINTS)
    raise ConfigError(f"no script {name}: there are {known}, or the path of your own script")


def _split_tasks(words: list[str]) -> tuple[list[str], list[str]]:
    """The tasks and the configuration files among what followed --eval_tasks.

    The flag takes every word up to the next flag. No task is called *.yml, so
    `--eval_tasks lambada 20B.yml` can only mean one thing.
    """
    confs = [word for word in words if word.endswith(SUFFIXES)]
    tasks = [task for word in words if word not in confs for task in word.split(",") if task]
    return tasks, confs


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"\d+", text) else float(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


_batch_size.__name__ = "batch size"
_number.__name__ = "number"  # argparse shows it: invalid number value: 'x'


def _explain_unknown(parser: _Parser, word: str) -> str:
    flag = word.partition("=")[0]
    known = {option.replace("-", "_"): option for option in parser._option_string_actions}
    near = difflib.get_close_matches(flag.replace("-", "_"), known, n=1, cutoff=0.7)
    if near:
        return f"there is no flag {flag}; did you mean {known[near[0]]}?"
    key = flag.lstrip("-").replace("-", "_")
    if key in {field.name for field in dataclasses.fields(NeoXConfig)}:
        return f"there is no flag {flag}; {key} is a key of the configuration: --set {key}=VALUE"
    return f"there is no flag {flag}; any key of the configuration is set by --set key=value"
