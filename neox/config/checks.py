"""The frame of the cross checks: a check reads keys and yields what is wrong with them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neox.config.config import NeoXConfig

Findings = Iterator[tuple[str, str]]  # the key to blame, the message
Run = Callable[[NeoXConfig], Findings]


@dataclass(frozen=True)
class _Check:
    run: Run
    reads: frozenset[str]
    purposes: tuple[str, ...]  # () is every purpose


class Checks:
    """A list of checks, filled by the decorator `reading`."""

    def __init__(self) -> None:
        self._checks: list[_Check] = []

    def reading(self, *keys: str, purposes: tuple[str, ...] = ()) -> Callable[[Run], Run]:
        """Add a check that reads `keys` and matters to `purposes`."""

        def add(run: Run) -> Run:
            self._checks.append(_Check(run, frozenset(keys), purposes))
            return run

        return add

    def about(self, *keys: str) -> Checks:
        """Those of these checks that read one of `keys`."""
        chosen = Checks()
        chosen._checks = [check for check in self._checks if check.reads & set(keys)]
        return chosen

    def run(self, config: NeoXConfig, purpose: str | None, bad: set[str]) -> Findings:
        """The findings of every check that matters to `purpose` and reads no key in `bad`."""
        for check in self._checks:
            if not check.reads & bad and (not check.purposes or purpose in check.purposes):
                yield from check.run(config)
