"""A configuration on its way: values, where they come from, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from neox import log
from neox.errors import ConfigError

SAID = ("", "default", "derived", "fitted", "given")  # origins that a message does not open with


@dataclass(frozen=True)
class Problem:
    """One thing wrong: a complete message, and the place to put it right ("pythia.yml:12")."""

    message: str
    origin: str = ""
    key: str = ""

    def __str__(self) -> str:
        return self.message if self.origin in SAID else f"{self.origin}: {self.message}"


@dataclass
class Draft:
    """What the loader fills in, stage by stage.

    `bad` holds the keys whose value is missing or wrong; checks that would read them are left out,
    so that one mistake is reported once.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines about what was decided
    bad: set[str] = field(default_factory=set)

    def origin(self, path: str) -> str:
        """Where `path` (dotted) was given, or the block that holds it."""
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        return self.origins.get(path, "")

    def from_command_line(self, path: str) -> bool:
        return self.origin(path).startswith("-")

    def problem(self, path: str, message: str) -> None:
        """Report a wrong value; the whole top-level key counts as bad."""
        self.problems.append(Problem(message, self.origin(path)))
        self.bad.add(path.partition(".")[0])

    def warn(self, path: str, message: str) -> None:
        """Report a value that does nothing."""
        self.warnings.append(Problem(message, self.origin(path)))

    def settle(self, key: str, value: Any, origin: str = "derived") -> None:
        """Give a key the value that follows from others."""
        if self.values.get(key) != value:
            self.origins[key] = origin
        self.values[key] = value

    def finish(self) -> None:
        """Print warnings and notes; raise ConfigError with every problem, in the files' order."""
        if self.problems:
            raise ConfigError(self._report())
        for warning in self._ordered(self.warnings):
            log.warning(str(warning))
        for note in self.notes:
            log.info(note)

    def _report(self) -> str:
        lines = [str(problem) for problem in self._ordered(self.problems)]
        if len(lines) == 1:
            return lines[0]
        return "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])

    def _ordered(self, problems: Iterable[Problem]) -> list[Problem]:
        names = list(self.texts)

        def place(problem: Problem) -> tuple[int, int]:
            name, _, line = problem.origin.rpartition(":")
            if name in names and line.isdigit():
                return names.index(name), int(line)
            return len(names), 0

        return sorted(dict.fromkeys(problems), key=place)
