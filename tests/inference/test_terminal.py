"""Prompts typed on a pseudo-terminal: editing, lines, pasting, the history, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.terminal import CTRL_C, CTRL_D, UP, Person

REPOSITORY = Path(__file__).parents[2]
PASTE = "\x1b[200~{}\x1b[201~"  # how a terminal marks what is pasted

# It says what it reads, and works when it is told to, until Ctrl-C; with END without an end.
CHILD = """
import sys
from neox.inference.terminal import Terminal

with Terminal(sys.argv[1], lambda claimed: print("claimed" if claimed else "free")) as terminal:
    while (text := terminal.read()) is not None:
        print("read", ascii(text), flush=True)
        while text == "work" and not terminal.interrupted:
            pass
        if text == "work":
            print("stopped", flush=True)
            if sys.argv[1] == "END":
                while True:
                    pass
print("left", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Person]]:
    """start(prompt_end, **environment) begins a conversation; the history is in `tmp_path`."""
    people = []

    def begin(prompt_end: str = "\n", **environment: str) -> Person:
        environment = {"PYTHONPATH": str(REPOSITORY), "XDG_STATE_HOME": str(tmp_path)} | environment
        people.append(Person([sys.executable, "-c", CHILD, prompt_end], tmp_path, environment))
        people[-1].sees("Ctrl-C stops an answer")
        people[-1].sees(">>> ")
        return people[-1]

    yield begin
    for person in people:
        person.close()


def enters(person: Person, keys: str) -> str:
    """Type and press Enter; what was read, as Python writes it."""
    person.types(keys + "\r")
    text = person.sees("read .*\n").rpartition("read ")[2].strip()
    person.sees(">>> ")
    return text


def test_lines_are_edited_and_continued(start) -> None:
    person = start()
    assert enters(person, "worlds\x7f\x01hello \x05!") == "'hello world!'"
    assert enters(person, "one\\\r  two\\\r") == r"'one\n  two\n'"
    assert enters(person, "\r \r:set seed 1") == "':set seed 1'"  # blank prompts are none
    person.types("un\\\r" + CTRL_D)  # the end of the input ends the prompt first
    person.sees(r"read 'un\\n'")
    person.sees(">>> ")
    person.types(CTRL_D)
    person.sees("left")
    assert person.leaves() == 0


def test_what_is_pasted_is_one_prompt(start) -> None:
    person = start()
    assert enters(person, PASTE.format("def f():\r\r\treturn 1")) == r"'def f():\n\n\treturn 1'"
    assert enters(person, UP) == r"'def f():\n\n\treturn 1'"


def test_a_prompt_ends_where_prompt_end_appears(start) -> None:
    person = start("END")
    person.types("one\r\rtwo END three\r")
    assert r"read 'one\n\ntwo '" in person.sees("read .*\n")
    person.sees(">>> ")
    assert enters(person, UP) == r"'one\n\ntwo '"
    assert enters(person, ":help") == "':help'"


def test_ctrl_c_at_the_prompt_clears_it_and_ends_when_there_is_nothing(start) -> None:
    person = start()
    for _ in range(2):  # something is cleared each time, so these are not the two in a row
        person.types("half")
        person.sees("half")
        person.interrupts_typing()
        assert "again" not in person.sees(">>> ")
        person.types("first\\\r")
        person.sees(r"\.\.\. ")
        person.interrupts_typing()
        assert "again" not in person.sees(">>> ")
    person.interrupts_typing()
    person.sees("Ctrl-C again or Ctrl-D ends")
    person.sees(">>> ")
    assert enters(person, "whole") == "'whole'"
    person.interrupts_typing()
    person.sees(">>> ")
    person.interrupts_typing()
    person.sees("left")
    assert person.leaves() == 0


def test_ctrl_c_at_work_is_a_request_and_the_second_an_end(start) -> None:
    person = start("END")
    person.types("workEND\r")
    person.sees("read 'work'")
    person.types(CTRL_C)
    assert "free" in person.sees("stopped")
    person.types(CTRL_C)
    person.sees("KeyboardInterrupt")
    assert person.leaves() == -signal.SIGINT
    again = start()
    again.types("work\r")
    again.sees("read 'work'")
    again.types(CTRL_C)
    assert "claimed" in again.sees("stopped(?s:.*)>>> ")
    assert enters(again, "go on") == "'go on'"


def test_the_history_is_kept_and_damage_is_passed_over(start, tmp_path: Path) -> None:
    person = start()
    enters(person, "a\\\rnaïve")
    enters(person, "last")
    enters(person, "last")
    person.types(CTRL_D)
    assert person.leaves() == 0
    file = tmp_path / "neox" / "prompts.jsonl"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() == '"a\\nna\\u00efve"\n"last"\n'
    file.write_text(file.read_text() + 'no JSON\n{}\n"\\u0000"\n"\\ud800"\n')
    later = start()
    assert enters(later, UP + UP) == r"'a\nna\xefve'"


def test_a_long_history_loses_its_beginning(start, tmp_path: Path) -> None:
    file = tmp_path / "neox" / "prompts.jsonl"
    file.parent.mkdir()
    file.write_text("".join(f'"{n}"\n' for n in range(2001)))
    assert enters(start(), UP) == "'2000'"
    assert len(file.read_text().splitlines()) == 1000


def test_a_place_that_cannot_be_written_costs_a_warning(start, tmp_path: Path) -> None:
    (tmp_path / "neox").write_text("a file")
    person = start()
    person.types("one\r")
    assert "warning: prompts are not remembered" in person.screen + person.sees(">>> ")
    assert enters(person, UP) == "'one'"


def test_it_works_on_a_dumb_terminal_and_without_readline(start, tmp_path: Path) -> None:
    dumb = start(TERM="dumb")
    assert enters(dumb, "hello") == "'hello'"
    (tmp_path / "readline.py").write_text("raise ImportError('not built')")
    plain = start(PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    assert enters(plain, "one\\\rtwo") == r"'one\ntwo'"
    plain.interrupts_typing()
    plain.sees("again or Ctrl-D ends")
    plain.sees(">>> ")
    plain.types(CTRL_D)
    assert plain.leaves() == 0


def test_nothing_heavy_is_imported_to_read_a_line() -> None:
    script = "import sys, neox.inference.terminal; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
