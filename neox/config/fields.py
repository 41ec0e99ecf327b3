"""How a configuration key is declared: type, default, one line of documentation, bounds, status."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Status = Literal["acts", "ignored", "refused", "launcher"]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a section module says about one key, besides its name and type.

    `reason` explains a status other than "acts". `refused` gives, value by value, why a key that
    acts does not take some of the values upstream knows.
    """

    doc: str
    status: Status = "acts"
    reason: str = ""
    low: float | None = None  # inclusive
    high: float | None = None  # inclusive
    above: float | None = None  # exclusive lower bound
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


REQUIRED = dataclasses.MISSING


def key(default: Any, doc: str, **bounds: Any) -> Any:
    """A key that acts. `bounds` are `low`, `high`, `above` and `refused` of `Key`."""
    return _field(default, Key(doc, **bounds))


def ignored(default: Any, doc: str, why: str) -> Any:
    """A key that is accepted and does nothing; a value other than the default gets one warning."""
    return _field(default, Key(doc, "ignored", why))


def refused(default: Any, doc: str, why: str) -> Any:
    """A key whose every value but the default is an error."""
    return _field(default, Key(doc, "refused", why))


def launcher(default: Any, doc: str, why: str = "the launcher sets it") -> Any:
    """A key that saved configurations carry and the launcher sets; what a file says is dropped."""
    return _field(default, Key(doc, "launcher", why))


def _field(default: Any, spec: Key) -> Any:
    metadata = {"key": spec}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
