"""How a key is declared: one line with its type, default, meaning, bounds and what becomes of it.

Sections are dataclasses, blocks (the shape of a nested mapping such as `fp16`) plain classes; both
declare keys with the same four words, and `keys_of` reads them back:

    num_layers: int = key(REQUIRED, "Transformer layers.", low=1)
    rope_fusion: bool = ignored(False, "Fused rotary kernel.", "torch runs it unfused")
    use_mup: bool = refused(False, "Maximal update parametrisation.", "it is not supported")
    zero_stage: int = derived(0, "ZeRO stage in use.", "zero_optimization.stage sets it")
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

Status = Literal["acts", "ignored", "refused", "derived"]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a declaration says beyond the key's name.

    status "acts": it does what its doc line says.
    status "ignored": any value is accepted; one that differs from the default gets one warning.
    status "refused": any value that differs from the default is an error.
    status "derived": what a file says is dropped with a warning; the loader or launcher sets it.
    `reason` explains the last three, to a user. `refused` maps single values of a key that acts to
    why they are refused. `block` is the shape of a mapping's keys; without one, any are accepted.
    """

    doc: str
    status: Status = "acts"
    reason: str = ""
    low: float | None = None  # inclusive bounds
    high: float | None = None
    above: float | None = None  # exclusive bound
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    block: type | None = None
    type: Any = None  # both filled in by keys_of
    default: Any = None

    @property
    def required(self) -> bool:
        """Whether a configuration must give a value."""
        return self.default is REQUIRED


REQUIRED = dataclasses.MISSING


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A key that acts; `rules` are `low`, `high`, `above`, `refused` and `block` of `Key`."""
    return _field(default, Key(doc, **rules))


def ignored(default: Any, doc: str, why: str, **rules: Any) -> Any:
    """A key that is accepted and does nothing."""
    return _field(default, Key(doc, "ignored", why, **rules))


def refused(default: Any, doc: str, why: str) -> Any:
    """A key that takes its default and nothing else."""
    return _field(default, Key(doc, "refused", why))


def derived(default: Any, doc: str, why: str) -> Any:
    """A key that is computed; a file may carry it and is not believed."""
    return _field(default, Key(doc, "derived", why))


def _field(default: Any, spec: Key) -> Any:
    assert not isinstance(default, list | dict), "a mutable default would be shared"
    metadata = {"key": spec}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def keys_of(owner: Any) -> Mapping[str, Key]:
    """Every key that a section, a block or the whole configuration declares, in order."""
    types = typing.get_type_hints(owner)
    if dataclasses.is_dataclass(owner):
        fields = {field.name: field for field in dataclasses.fields(owner)}
    else:
        fields = {n: f for n, f in vars(owner).items() if isinstance(f, dataclasses.Field)}
    return {
        name: dataclasses.replace(field.metadata["key"], type=types[name], default=field.default)
        for name, field in fields.items()
        if "key" in field.metadata
    }
