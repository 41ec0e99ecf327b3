"""The documents name files that exist and show commands that are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from neox.cluster.arguments import parse
from neox.config import load_config

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
FOLDERS = "neox|tests|tools|configs|docs|requirements|benchmarks"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\.(?:py|md|yml|txt))")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def named(document: Path) -> list[Path]:
    """The files of this repository that a document links to or mentions."""
    text = document.read_text()
    links = [document.parent / target for target in LINK.findall(text)]
    return links + [REPOSITORY / path for path in PATH.findall(text)]


def commands() -> list[str]:
    """The ./deepy.py commands in the shell blocks of all documents, continuation lines joined."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("./deepy.py")]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    assert [path for path in named(document) if not path.exists()] == []


def test_commands_that_documents_show_are_understood() -> None:
    assert len(commands()) > 5
    for command in commands():
        arguments = parse(shlex.split(command, comments=True)[1:])
        config = load_config(
            arguments.files,
            arguments.overrides,
            conf_dir=REPOSITORY / (arguments.conf_dir or ""),
            purpose=arguments.entry_point,
            check_files=False,
        )
        assert config.world_size >= 1, command
