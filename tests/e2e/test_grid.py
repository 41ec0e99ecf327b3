"""generate.py with a grid for more devices than there are: the one that fits, the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import scripts, small_tokenizer
from tests.models import BASE, write_new_model
from tests.world import World

DEEPY = Path(__file__).parents[2] / "deepy.py"
VALUES = BASE | {"num_layers": 4}
VOCABULARY = 280  # of the small tokenizer
PROMPTS = "It was\nthe age of\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one shard, its tokenizer, prompts, and a YAML file for 8 devices."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer.write(folder)
    values = VALUES | {"model_parallel_size": 2, "pipe_parallel_size": 4}
    values |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer)}
    values |= {"load": str(folder), "maximum_tokens": 6}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in values.items()]
    (folder / "model.yml").write_text("".join(sorted(lines)))
    (folder / "prompts.txt").write_text(PROMPTS)
    write_new_model(folder, VOCABULARY, **VALUES)
    return folder


def generate(
    world: World, folder: Path, name: str, *arguments: str, cores: int = 1
) -> tuple[list[str], list]:
    """The lines about the grid, and the results, of a run on so many of the machine's cores."""
    output = folder / f"{name}.jsonl"
    command = ["generate.py", "model.yml", "-i", "prompts.txt", "-o", str(output), *arguments]
    run = scripts.run(world, DEEPY, *command, cwd=folder, cores=cores)
    assert (run.returncode, run.stderr) == (0, "")
    results = [json.loads(line) for line in output.read_text().splitlines()]
    texts = [(result["context"], result["text"], result["message"]) for result in results]
    return [line for line in run.stdout.splitlines() if line.startswith("grid:")], texts


@pytest.fixture(scope="module")
def plain(world: World, folder: Path) -> list:
    """What one process generates that was asked for."""
    sizes = ("--set", "model_parallel_size=1", "--set", "pipe_parallel_size=1")
    lines, texts = generate(world, folder, "plain", *sizes)
    assert lines == [] and [text[0] for text in texts] == PROMPTS.splitlines()
    assert all(text and message is None for _, text, message in texts)
    return texts


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("num_gpus", ["--set", "num_gpus=2"], "needs 8 devices and there are 2: using tp 2 x pp 1"),
        ("one_slot", ["-H", "slots"], "needs 8 devices and there is 1: using tp 1 x pp 1"),
        (
            "three_slots",
            ["-H", "slots"],
            "needs 8 devices and there are 3: using tp 2 x pp 1, 1 device is not used",
        ),
        ("nothing", [], "is 8 processes, more than 2 for each of 1 core: using tp 1 x pp 1"),
    ],
)
def test_the_grid_fits_itself(
    world: World, name: str, arguments: list[str], line: str, folder: Path, plain: list
) -> None:
    (folder / "slots").write_text(f"localhost slots={3 if name == 'three_slots' else 1}\n")
    origin = next(
        number
        for number, text in enumerate((folder / "model.yml").read_text().splitlines(), start=1)
        if text.startswith("model_parallel_size")
    )
    lines, texts = generate(world, folder, name, *arguments)
    assert lines == [f"grid: tp 2 x pp 4 (model.yml:{origin}) {line}"]
    assert texts == plain
