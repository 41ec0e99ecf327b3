"""generate.py at a terminal: answers that Ctrl-C stops, in one process and over two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import small_tokenizer
from tests.models import BASE, write_new_model
from tests.terminal import CTRL_C, CTRL_D, CTRL_Z, PATIENCE_S, UP, Person

DEEPY = Path(__file__).parents[2] / "deepy.py"
LONG = 100_000  # tokens: an answer without an end, as far as a test goes
VALUES = BASE | {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
VALUES |= {"seq_length": LONG, "max_position_embeddings": LONG}
VOCABULARY = 280  # of the small tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its tokenizer and model.yml, whose answers have three tokens."""
    folder = tmp_path_factory.mktemp("model")
    values = VALUES | {"tokenizer_type": "HFTokenizer", "load": str(folder), "maximum_tokens": 3}
    values |= {"vocab_file": str(small_tokenizer.write(folder)), "text_gen_type": "interactive"}
    (folder / "model.yml").write_text(json.dumps(values))
    write_new_model(folder, VOCABULARY, **VALUES)
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[[int], Person]]:
    """start(tp) is somebody at the terminal of `generate.py model.yml`, asked for a prompt."""
    people = []

    def begin(tp: int) -> Person:
        command = [sys.executable, DEEPY, "generate.py", "model.yml"]
        environment = {"XDG_STATE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        person = Person([*command, "--set", f"model_parallel_size={tp}"], folder, environment)
        people.append(person)
        person.sees("Ctrl-C stops an answer")
        person.sees(">>> ")
        return person

    yield begin
    for person in people:
        person.close()


def asks(person: Person, keys: str) -> str:
    """Type a prompt that is answered to its end; return the answer."""
    person.types(keys + "\r")
    screen = person.sees(r"\[3 tokens, the first after .*; ended by maximum_tokens\]")
    person.sees(">>> ")
    return screen.partition("Generated Text: ")[2].rpartition("\n")[0]


def sets(person: Person, name: str, value: int) -> None:
    person.types(f":set {name} {value}\r")
    person.sees(f"\n{name} {value}\n")
    person.sees(">>> ")


def stops(person: Person, keys: str) -> None:
    """Type a prompt whose answer has no end, and stop it after its first character."""
    sets(person, "maximum_tokens", LONG // 2)
    person.types(keys + "\r")
    person.sees("Generated Text: (?s:.)")
    person.types(CTRL_C)
    person.sees(r"\[\d+ tokens?, the first after .*; ended by Ctrl-C\]")
    person.sees(">>> ")
    sets(person, "maximum_tokens", 3)


def test_answers_are_stopped_and_prompts_remembered(start: Callable[[int], Person]) -> None:
    person = start(1)
    answer = asks(person, "It was\\\rthe best")
    stops(person, "of times")
    assert asks(person, UP * 4) == answer
    person.types(CTRL_D)
    assert person.leaves() == 0
    # Over two ranks, which would not understand each other if they stopped behind different tokens.
    person = start(2)
    stops(person, "of times")
    person.types(CTRL_Z)
    assert asks(person, UP * 4) == answer
    stops(person, "of times")
    person.types(CTRL_D)
    assert person.leaves() == 0


def test_a_pipe_gives_the_answers_and_nothing_else(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, DEEPY, "generate.py", "model.yml"],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        input="It was\\\n:quit\nthe best",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (run.returncode, run.stderr) == (0, "")
    answers = re.findall("Context prompt >>> (?:[.]{3} )?Generated Text: .+\n", run.stdout)
    assert len(answers) == 3
    assert "".join(answers) + "Context prompt >>> \n" == run.stdout
