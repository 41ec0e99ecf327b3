"""What is said when hosts do not run the same thing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from neox.cluster.peers import Facts, compare, facts
from neox.errors import ConfigError
from tests.models import config_of

A = Facts("a", "c1", "s1", {"Python": "3.11.7", "torch": "2.13.0"}, 1000.0)


def b(**changes: Any) -> Facts:
    return dataclasses.replace(A, host="b", **changes)


def test_ranks_that_agree_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    compare([A, A, b(clock_s=1001.0)])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (b(versions=A.versions | {"torch": "2.9"}), "torch: 2.13.0 on a; 2.9 on b, d"),
        (b(code="s2"), "neox's own code (a hash of it): s1 on a; s2 on b, d"),
        (b(configuration="c2"), "the configuration (a hash of its values): c1 on a; c2 on b, d"),
    ],
)
def test_a_difference_names_hosts_and_values(other: Facts, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compare([A, A, other, dataclasses.replace(other, host="d")])
    assert line in str(error.value).splitlines()[1]


def test_clocks_that_differ_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    compare([A, b(clock_s=1090.0)])
    assert "warning: the clock of b is 90 s ahead of that of a" in capsys.readouterr().err


def test_facts_depend_on_values_alone() -> None:
    mine = facts(config_of())
    assert mine.configuration == facts(config_of()).configuration
    assert mine.configuration != facts(config_of(seed=5)).configuration
    assert mine.versions["torch"] != "none"
