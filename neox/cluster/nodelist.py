"""Schedulers' and shells' short forms for the names of many hosts."""

from __future__ import annotations

import re

from neox.errors import ConfigError


def expand(text: str) -> list[str]:
    """The hosts of `node[01-03,7],gpu-[1-2]-[a,b]`: Slurm's hostlists, in their order.

    Raises ConfigError for brackets that do not match and ranges that are none.
    """
    return [host for part in _split(text, text) for host in _expand_one(part, text)]


def counts(text: str) -> list[int]:
    """Slurm's numbers per node: `2(x3),1` is 2, 2, 2, 1. Raises ConfigError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{text!r} is not a list of numbers per node, such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _split(text: str, whole: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or "" in parts:
        raise ConfigError(f"{whole!r} is not a list of hosts, such as node[01-12],login")
    return parts


def _expand_one(text: str, whole: str) -> list[str]:
    before, bracket, rest = text.partition("[")
    if not bracket:
        return [text]
    inside, _, after = rest.partition("]")
    names = [name for part in inside.split(",") for name in _range(part, whole)]
    return [before + name + end for name in names for end in _expand_one(after, whole)]


def _range(text: str, whole: str) -> list[str]:
    """01-03 is 01, 02, 03: as many digits as the first has."""
    first, dash, last = text.partition("-")
    if not dash and text:
        return [text]
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"{whole!r}: {text!r} is not a range of numbers, such as 01-12")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
