"""Short forms for many hosts."""

from __future__ import annotations

import pytest

from neox.cluster.nodelist import counts, expand
from neox.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("b,a", ["b", "a"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("r[1-2]n[a,b].x,z", ["r1na.x", "r1nb.x", "r2na.x", "r2nb.x", "z"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "a,", "n[1-3", "n1-3]", "n[[1]]", "n[3-1]", "n[a-b]", "n[]", "n[²-3]"]
)
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a"):
        expand(text)


def test_numbers_per_node() -> None:
    assert counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match=r"'2\(x' is not a list of numbers"):
        counts("2(x")
