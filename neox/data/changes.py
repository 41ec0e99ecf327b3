"""Whether a resumed run reads the data that it began with, in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neox import log
from neox.config import NeoXConfig
from neox.data.loaders import Loader
from neox.data.samples import ORDER_VERSION

_SETTINGS = ("train_batch_size", "seq_length", "seed", "pack_impl", "allow_chopped")
_SHOWN = 4


def order_facts(config: NeoXConfig, loader: Loader) -> dict[str, Any]:
    """Everything that says which samples a step reads; small, for a checkpoint to hold.

    The datasets by their content, not by their names: they may move.
    """
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return {"version": ORDER_VERSION, **settings, "data": loader.facts}


def warn_of_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A warning when the order of a checkpoint is not this run's."""
    changes = list(_changes("", before, now))
    if changes:
        more = f" and {len(changes) - _SHOWN} more" * (len(changes) > _SHOWN)
        log.warning(
            "the training data, or its order, is not the one that the checkpoint was trained on: "
            f"{'; '.join(changes[:_SHOWN])}{more}. The run goes on at its step in the new order, "
            "where it may meet documents again and miss others"
        )


def _changes(path: str, before: Any, now: Any) -> Iterator[str]:
    """What differs, each as "name before -> now"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _changes(f"{path}.{name}", before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for n, pair in enumerate(zip(before, now, strict=True)):
            yield from _changes(f"{path}[{n}]", *pair)
    elif isinstance(before, list) and isinstance(now, list):
        yield f"{path[1:]}: {len(before)} -> {len(now)}"
    elif before != now:
        yield f"{path[1:]} {before} -> {now}"
