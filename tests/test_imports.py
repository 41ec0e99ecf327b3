"""The architecture, enforced: imports go downward, and each library comes in by its own door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# Each step may import the steps above it in this list, and nothing of its own step.
ORDER = [
    ["errors", "log", "atomic", "progress"],
    ["config", "kernels"],
    ["parallel"],
    ["model"],
    ["checkpoint", "data", "tokenizer"],
    ["engine", "inference"],
    ["train", "evaluation", "serving", "cluster", "plan"],
    ["entrypoints"],
]
STEP = {package: step for step, packages in enumerate(ORDER) for package in packages}

# Where a library may be imported: modules or packages. Any other is not to be used at all.
ABOVE_CONFIG = tuple(f"neox.{package}" for packages in ORDER[2:] for package in packages)
DOORS = {
    "yaml": ("neox.config", "neox.plan.cluster"),
    "tqdm": ("neox.log", "neox.evaluation.adapter"),  # there for the type of a bar
    "torch": (*ABOVE_CONFIG, "neox.kernels"),
    # neox.inference.logits: arrays in and out, for other programs
    "numpy": ("neox.data", "neox.checkpoint", "neox.inference.logits"),
    "megatron": ("neox.parallel", "neox.data"),
    "deepspeed": ("neox.engine",),
    "transformers": ("neox.checkpoint.hf", "neox.tokenizer.chat"),
    "safetensors": ("neox.checkpoint",),
    "xxhash": ("neox.checkpoint",),
    "tokenizers": ("neox.tokenizer",),
    "sentencepiece": ("neox.tokenizer",),
    "tiktoken": ("neox.tokenizer",),
    "ftfy": ("neox.data",),
    "compression": ("neox.data",),  # the standard library's, from Python 3.14
    "backports": ("neox.data",),
    "lm_eval": ("neox.evaluation",),
    "datasets": ("neox.evaluation",),
    "wandb": ("neox.train.wandb_run",),
    "fastapi": ("neox.serving",),
    "starlette": ("neox.serving",),  # what fastapi is made of
    "pydantic": ("neox.serving",),
    "pydantic_core": ("neox.serving.schemas",),
    "uvicorn": ("neox.serving.server", "neox.serving.protocol"),
    "h11": ("neox.serving.protocol",),
    "prometheus_client": ("neox.serving.metrics",),
    "matplotlib": ("neox.plan.picture",),
    "bitsandbytes": ("neox.model.quantized", "neox.engine"),
}


def modules() -> dict[str, str]:
    """Every module of the project, by dotted name, with its source."""
    found = {"deepy": (REPOSITORY / "deepy.py").read_text()}
    for file in (REPOSITORY / "neox").rglob("*.py"):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file.read_text()
    return found


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, at whatever depth; also of what is loaded by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            # `from neox import log` names the package's module, not only the package.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield node.lineno, "import_module"


def violations(sources: Mapping[str, str]) -> list[str]:
    """What the sources import against the rules, one line each."""
    found = []
    for module, source in sources.items():
        for line, name in imports(module, source):
            reason = wrong(module, name)
            if reason:
                found.append(f"{module}:{line}: {reason}")
    return found


def wrong(module: str, name: str) -> str | None:
    """Why `module` must not import `name`; None when it may."""
    top = name.partition(".")[0]
    if name == "import_module":
        # The launcher runs what a job names, ours or the user's; nobody else needs a loophole.
        allowed = module == "neox.cluster.execute"
        return None if allowed else "modules are imported by name in neox.cluster.execute only"
    if top == "neox":
        return wrong_direction(module, name)
    if top in sys.stdlib_module_names:
        return None
    if top not in DOORS:
        return f"{top} has no door in this project"
    if not any(is_within(module, door) for door in DOORS[top]):
        return f"{top} enters through {', '.join(DOORS[top])}"
    return None


def wrong_direction(module: str, name: str) -> str | None:
    package = name.partition(".")[2].partition(".")[0]
    if package not in STEP:  # a name of neox itself, such as __version__
        return None
    if module == "deepy":
        allowed = package in ("cluster", "config")
        return None if allowed else "deepy.py imports neox.cluster and neox.config only"
    own = module.split(".")[1] if "." in module else "neox"
    if own == package or STEP.get(own, -1) > STEP[package]:
        return None
    return f"neox.{own} must not import neox.{package}, which stands above or beside it"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_go_downward_and_libraries_come_in_by_their_doors() -> None:
    assert violations(modules()) == []


def test_every_package_has_its_place_in_the_order() -> None:
    packages = {module.split(".")[1] for module in modules() if module.startswith("neox.")}
    assert packages - set(STEP) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("neox.config.load", "import neox.parallel"),
        ("neox.model.gpt", "def build():\n    from neox.engine.build import build_engine"),
        ("neox.model.gpt", "if TYPE_CHECKING:\n    from neox.engine import build"),
        ("neox.engine.build", "from neox import inference"),
        ("neox.tokenizer", "from neox.data.loaders import Batch"),
        ("neox.cluster.launch", "from neox.entrypoints import train"),
        ("neox.cluster.launch", "importlib.import_module('neox.entrypoints.train')"),
        ("neox.errors", "import neox.log"),
        ("neox", "from neox.config import load_config"),
        ("deepy", "from neox.errors import NeoXError"),
        ("neox.config.load", "import torch"),
        ("neox.train.loop", "def f():\n    import deepspeed.comm"),
        ("neox.train.loop", "import wandb"),
        ("neox.train.loop", "from transformers import GPTNeoXForCausalLM"),
        ("neox.model.gpt", "import einops"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    (found,) = violations({module: source})
    assert found.startswith(f"{module}:")


def test_what_is_allowed_is_not_found() -> None:
    source = "import os.path\nimport torch\nfrom neox import __version__, log\nimport neox.config\n"
    assert violations({"neox.train.loop": source}) == []
