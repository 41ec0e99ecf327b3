"""Several LoRA adapters over one model, of which a pass has one or none."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from neox import log
from neox.checkpoint.peft import Adapters, fill, find_adapter, read_adapters
from neox.config import NeoXConfig
from neox.errors import CheckpointError, RequestError
from neox.model.frozen import Frozen
from neox.model.gpt import Layer
from neox.model.lora import Adapter, attach, pack_adapters
from neox.parallel.groups import ProcessGroups


def read_named(
    paths: Mapping[str, str], config: NeoXConfig, groups: ProcessGroups, padded_vocab_size: int
) -> dict[str, Adapters]:
    """What `read_adapters` makes of the folder of each name.

    Collective over the world, where rank 0 decides which step is the latest of a folder of
    checkpoints. Raises CheckpointError with the adapter's name.
    """
    found = {}
    for name, path in paths.items():
        with _telling(name):
            folder = groups.gather(find_adapter(Path(path)))[0]
            found[name] = read_adapters(folder, config, padded_vocab_size)
        count = len(found[name].specs)
        log.info(f"adapters.{name}: {count} matrices have adapters, from {folder}")
    return found


@dataclass(frozen=True)
class _Change:
    """What an adapter puts in the place of an attribute of one of the model's modules.

    An Adapter where there was none, or a bias or a norm's parameter in place of the base's.
    """

    owner: nn.Module
    attribute: str
    base: nn.Parameter | None
    own: nn.Parameter | Adapter


class NamedAdapters:
    """This rank's shards of adapters, beside a model that is as it was loaded till one is selected.

    The base's parameters stay where they are in memory: what points to them goes on to compute the
    base.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.selected: str | None = None
        self._changes: dict[str, list[_Change]] = {name: [] for name in names}

    @property
    def names(self) -> Collection[str]:
        return self._changes.keys()

    def add(
        self,
        module: nn.Module,
        layer: Layer,
        named: Mapping[str, Adapters],
        dtype: torch.dtype,
        groups: ProcessGroups,
        *,
        packs: bool = False,
    ) -> None:
        """Make each adapter's part of a layer, whose own weights are there and on their device.

        packs: hold adapters packed, as those weights are.
        Not collective. Raises CheckpointError when one does not fit: see neox.checkpoint.peft.fill.
        """
        for name, adapters in named.items():
            changes = _attached(module, layer, adapters, dtype, groups)
            with _telling(name):
                fill(module, _adapted(layer, adapters, dtype, groups), adapters, groups)
            module.to(groups.device)
            if packs:
                pack_adapters(module)
            _take_off(changes)
            self._changes[name] += changes

    def select(self, name: str | None) -> None:
        """Let the model have this adapter, or None. Raises RequestError if there is none."""
        if name is not None and name not in self._changes:
            known = ", ".join(sorted(self._changes)) or "none"
            raise RequestError(
                f"there is no adapter {name!r} here; those that were loaded: {known}"
            )
        if name == self.selected:
            return
        if self.selected is not None:
            _take_off(self._changes[self.selected])
        if name is not None:
            for change in self._changes[name]:
                setattr(change.owner, change.attribute, change.own)
        self.selected = name


def _adapted(layer: Layer, adapters: Adapters, dtype: torch.dtype, groups: ProcessGroups) -> Layer:
    return replace(layer, frozen=Frozen(dtype, groups, specs=adapters.specs))


def _attached(
    module: nn.Module, layer: Layer, adapters: Adapters, dtype: torch.dtype, groups: ProcessGroups
) -> list[_Change]:
    """Give a layer places for an adapter's values, which are the base's or unset as yet."""
    assert layer.layout is not None
    specs = {name: spec for (at, name), spec in adapters.specs.items() if at == layer.index}
    attach(module, layer.layout, specs, dtype, groups, None)
    changes = []
    for matrix in specs:
        owner = module.get_submodule(matrix)
        assert isinstance(owner.adapter, Adapter)
        changes.append(_Change(owner, "adapter", None, owner.adapter.eval()))
    for name in adapters.of(layer.index).keys() & layer.layout.keys():
        path, _, attribute = name.rpartition(".")
        owner, base = module.get_submodule(path), module.get_parameter(name)
        own = nn.Parameter(base.detach().clone(), requires_grad=False)
        setattr(owner, attribute, own)
        changes.append(_Change(owner, attribute, base, own))
    return changes


def _take_off(changes: list[_Change]) -> None:
    for change in changes:
        setattr(change.owner, change.attribute, change.base)


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Says of which adapter a CheckpointError tells."""
    try:
        yield
    except CheckpointError as error:
        problem = str(error).removeprefix("adapter: ")
        raise CheckpointError(f"adapters.{name}: {problem}") from error
