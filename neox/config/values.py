"""Whether a value fits its key, and how values are written in messages."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from neox.config.fields import Key

_LONGEST = 60


class Misfit(Exception):
    """A value does not fit; the text completes the sentence "<key> is <value>, ..."."""


def show(value: Any) -> str:
    """A value as a user would write it in YAML, cut to a readable length."""
    if isinstance(value, float):
        return repr(value)  # json writes NaN and Infinity, YAML .nan and .inf; repr is plain
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def plain(number: float) -> str:
    """A bound as a user would write it: 1, 0.5, 4294967295."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def listed(words: Iterable[Any], last: str = "or") -> str:
    """1, 2 or 3"""
    texts = [str(word) for word in words]
    return f" {last} ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.72)
    return folded[near[0]] if near else None


def fit(value: Any, spec: Key) -> Any:
    """`value` in the type that `spec` declares and within its bounds. Raises Misfit.

    None fits every key and means that it is not set. An integer fits where a number is wanted,
    true and false never do; a choice is matched whatever its case.
    """
    value = _convert(value, spec.type)
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_bounds(value, spec)
    if isinstance(value, str) and value in spec.refused:
        raise Misfit(f"which is refused: {spec.refused[value]}.")
    return value


def describe_type(annotation: Any) -> str:
    """What a key takes, in words: "an integer", "one of nccl or gloo", "a list of numbers"."""
    if typing.get_origin(annotation) is typing.Literal:
        choices = typing.get_args(annotation)
        return f"one of {listed(choices)}" if len(choices) > 1 else str(choices[0])
    if typing.get_origin(annotation) is list:
        return f"a list of {_PLURALS[typing.get_args(annotation)[0]]}"
    branches = [a for a in _branches(annotation) if a is not type(None)]
    if int in branches and float in branches:
        branches.remove(int)  # "a number" says it
    if len(branches) > 1 or branches[0] is not annotation:
        return listed(describe_type(branch) for branch in branches)
    return _NAMES[typing.get_origin(annotation) or annotation]


_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a block of keys",
    Any: "anything",
}
_PLURALS = {int: "integers", float: "numbers", str: "texts", Any: "values"}


def _branches(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _convert(value: Any, annotation: Any) -> Any:
    if value is None or annotation is Any:
        return value
    for branch in _branches(annotation):
        fits, converted = _try(value, branch)
        if fits:
            return converted
    raise Misfit(f"but it must be {describe_type(annotation)}.{_hint(value, annotation)}")


def _try(value: Any, branch: Any) -> tuple[bool, Any]:
    """Whether the value belongs to one branch of a union, and the value in that type."""
    if typing.get_origin(branch) is typing.Literal:
        for choice in typing.get_args(branch):
            same = isinstance(value, type(choice)) and not isinstance(value, bool)
            if same and str(value).lower() == str(choice).lower():
                return True, choice
        return False, None
    if typing.get_origin(branch) is list:
        if not isinstance(value, list):
            return False, None
        (item_type,) = typing.get_args(branch)
        return True, [_item(index, item, item_type) for index, item in enumerate(value)]
    if branch in (int, float):
        if isinstance(value, bool):
            return False, None
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise Misfit("which does not fit into 64 bits.")
        if branch is float and isinstance(value, int):
            return True, float(value)
    if branch is str and value == "None":
        raise Misfit("which YAML reads as text. Write null for no value.")
    return isinstance(value, typing.get_origin(branch) or branch), value


def _item(index: int, item: Any, item_type: Any) -> Any:
    fits, converted = (True, item) if item_type is Any else _try(item, item_type)
    if not fits:
        raise Misfit(f"but item {index + 1}, {show(item)}, must be {_NAMES[item_type]}.")
    return converted


def _hint(value: Any, annotation: Any) -> str:
    """What to write instead, when that can be guessed."""
    branches = _branches(annotation)
    if isinstance(value, str):
        for branch in branches:
            if typing.get_origin(branch) is typing.Literal:
                choices = [str(choice) for choice in typing.get_args(branch)]
                if value in choices:
                    return f" Write {value}, without quotes."
                near = _same_type(value, choices) or nearest(value, choices)
                return f" Did you mean {near}?" if near else ""
            if branch in (int, float):
                if _is_number(value, branch):
                    return f" Write {value.strip()}, without quotes."
                for text in (value.rstrip(", "), value.replace("_", "-")):
                    if _is_number(text, branch):
                        return f" Did you mean {text}?"
            if branch is bool and value.lower() in ("true", "false", "yes", "no"):
                return f" Write {value.lower()}, without quotes."
            if typing.get_origin(branch) is list:
                return f" Write [{show(value)}]."
    if isinstance(value, list) and str in branches:
        return f" Write {show(', '.join(map(str, value)))}."
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and str in branches:
        return f' Write "{value}", in quotes.'
    if isinstance(value, float) and int in branches and value.is_integer():
        return f" Write {int(value)}."
    if number and bool in branches and value in (0, 1):
        return f" Write {'true' if value else 'false'}."
    return ""


def _same_type(name: str, choices: list[str]) -> str | None:
    """The choice that is another name of the same floating-point type."""
    for names in ({"fp32", "float32", "float"}, {"fp16", "float16", "half"}, {"bf16", "bfloat16"}):
        if name.lower() in names:
            return next((choice for choice in choices if choice in names), None)
    return None


def _is_number(text: str, kind: type) -> bool:
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False


def _check_bounds(value: float, spec: Key) -> None:
    if not math.isfinite(value):
        raise Misfit("but it must be a finite number.")
    if spec.low is not None and value < spec.low:
        raise Misfit(f"but it must be {plain(spec.low)} or more{_at_most(spec)}.")
    if spec.above is not None and value <= spec.above:
        raise Misfit(f"but it must be more than {plain(spec.above)}{_at_most(spec)}.")
    if spec.high is not None and value > spec.high:
        raise Misfit(f"but it must be {plain(spec.high)} or less.")


def _at_most(spec: Key) -> str:
    return "" if spec.high is None else f" and at most {plain(spec.high)}"
