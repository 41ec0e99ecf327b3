"""The dialect of YAML: which texts are numbers, and what JSON-like files may look like."""

from __future__ import annotations

import math
from typing import Any

import pytest

from neox.config.source import Malformed, parse


def value(text: str) -> Any:
    return parse(f"a: {text}", "a.yml").values["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6e-4", 6e-4),
        ("6.e-4", 6e-4),
        ("6.0e-4", 6e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("1E5", 1e5),
        ("-1e+3", -1e3),
        ("+.5e1", 5.0),
        ("1_000.5", 1000.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0b101", 5),
        ("017", 15),
        ("-12", -12),
        ("+12", 12),
        ("0", 0),
        ("123456789012345678901234567890", 123456789012345678901234567890),
        ("08", "08"),
        ("12:30:45", "12:30:45"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("_1", "_1"),
        ("2024-01-31", "2024-01-31"),
        ("'6e-4'", "6e-4"),
        ("True", True),
        ("no", False),
        ("on", True),
        ("None", "None"),
        ("null", None),
        ("~", None),
        ("", None),
        ("969, 30, 1", "969, 30, 1"),
        ("type:transformer|mlp", "type:transformer|mlp"),
        ('"\\n"', "\n"),
        ("!!str 5", "5"),
        ("[[[global], 2], [[], all]]", [[["global"], 2], [[], "all"]]),
    ],
)
def test_scalars(text: str, expected: Any) -> None:
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_floats_without_a_number() -> None:
    assert value("-.inf") == -math.inf
    assert value(".INF") == math.inf
    assert math.isnan(value(".NaN"))


@pytest.mark.parametrize(
    "text", ["9" * 5000, "0b_", "!!int x", "!!float x", "!!set {a}", "!!binary a"]
)
def test_scalars_that_cannot_be(text: str) -> None:
    with pytest.raises(Malformed):
        value(text)


def test_the_json_like_style() -> None:
    source = parse(
        '{\n  # one\n\t"a": 1, "b": True, # two\n  "c": {"d": 6e-4,},\n  "e-f": [1, 2,],\n}',
        "a.yml",
    )
    assert source.values == {"a": 1, "b": True, "c": {"d": 6e-4}, "e_f": [1, 2]}
    assert source.lines == {"a": 3, "b": 3, "c": 4, "c.d": 4, "e_f": 5}


def test_windows_line_ends() -> None:
    source = parse("a: 1\r\nb:\r\n  c: 2\r\n", "a.yml")
    assert source.values == {"a": 1, "b": {"c": 2}}
    assert source.lines["b.c"] == 3


def test_anchors_and_merged_keys() -> None:
    source = parse(
        "base: &base\n  a: 1\n  b: 2\nother:\n  b: 3\n  <<: *base\nthird:\n  <<: [*base, {c: 4}]\n",
        "a.yml",
    )
    assert source.values["other"] == {"a": 1, "b": 3}
    assert source.values["third"] == {"a": 1, "b": 2, "c": 4}
    assert source.lines["other.b"] == 5
    assert source.lines["other.a"] == 2


def test_merging_at_the_top_level() -> None:
    source = parse("<<: {a: 1, b: 2}\nb: 3\n", "a.yml")
    assert source.values == {"a": 1, "b": 3}
    assert source.lines == {"a": 1, "b": 2}


def test_an_alias_bomb_is_stopped() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(Malformed, match="more than 100000 values"):
        parse("\n".join(["a0: &a0 [x]", *levels]), "a.yml")


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(Malformed, match="more than 50 levels"):
        parse("a: " + "[" * 100_000 + "]" * 100_000, "a.yml")
