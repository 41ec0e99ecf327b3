"""From files and the command line to one checked configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neox.config import agreement, data_checks, frozen_checks, needs, optimizer_checks, source
from neox.config.accept import accept_all, hoist_extra_args, report_missing
from neox.config.adopt import adopt_folder
from neox.config.config import NeoXConfig
from neox.config.derive import (
    settle_optimizer,
    settle_packing,
    settle_precision,
    settle_prompts,
    settle_sizes,
)
from neox.config.draft import Draft, Problem
from neox.config.fields import keys_of
from neox.config.files import check_files as find_missing_files
from neox.config.grid import Devices, settle_grid
from neox.config.idle import idle_keys
from neox.config.values import Misfit, fit, show
from neox.errors import ConfigError

Purpose = Literal["train", "generate", "evaluate", "serve", "logits", "plan"]
_CROSS_CHECKS = [
    module.CHECKS for module in (agreement, data_checks, optimizer_checks, frozen_checks, needs)
]
WorldSize = int | Callable[[NeoXConfig], Devices | None] | None


@dataclass(frozen=True)
class Override:
    """A value from the command line and the flag it came with."""

    value: Any
    origin: str


def load_config(
    files: Sequence[Path],
    overrides: Mapping[str, Override] | None = None,
    *,
    conf_dir: Path | None = None,
    purpose: Purpose | None = None,
    world_size: WorldSize = None,
    check_files: bool = True,
) -> NeoXConfig:
    """The configuration that `files` (each relative to `conf_dir`) and `overrides` make together.

    Keys of `overrides` may be dotted: "optimizer.params.lr". `purpose` adds what that entry point
    needs: data to train on, a checkpoint to generate from; with `check_files`, also that the files
    exist. `world_size` is the number of processes, None if unknown, or a function that finds the
    devices from a configuration whose sizes are not settled yet: to generate and to evaluate, the
    grid is fitted to them, with a line about it. Prints one warning for each key that does nothing.
    Raises ConfigError with everything that is wrong.
    """
    draft = Draft()
    _read_files(draft, [(conf_dir or Path()) / file for file in files])
    for path, override in (overrides or {}).items():
        _override(draft, path.replace("-", "_"), override)
    config = _settle(draft, purpose, world_size)
    if check_files and purpose is not None:
        missing = find_missing_files(config, purpose)
        draft.problems += [problem for problem in missing if problem.key not in draft.bad]
    draft.finish()
    return config


def from_dict(
    values: Mapping[str, Any], *, world_size: int = 1, purpose: Purpose | None = None
) -> NeoXConfig:
    """The configuration of a mapping, for tests and tools: the same checks, but not of files."""
    draft = Draft()
    for name, value in values.items():
        draft.values[name.replace("-", "_")] = value
        draft.origins[name.replace("-", "_")] = "given"
    config = _settle(draft, purpose, world_size)
    draft.finish()
    return config


def change(config: NeoXConfig, name: str, value: Any, purpose: Purpose | None = None) -> NeoXConfig:
    """`config` with another value of a key that no other is derived from; None is its default.

    Raises ConfigError when the value is not what the key takes or does not agree with others.
    """
    spec = keys_of(NeoXConfig)[name]
    try:
        value = fit(value, spec)
    except Misfit as misfit:
        raise ConfigError(f"{name} is {show(value)}, {misfit}") from None
    values: dict[str, Any] = {name: spec.default if value is None else value}
    changed = dataclasses.replace(config, **values)
    for checks in _CROSS_CHECKS:
        for _, message in checks.about(name).run(changed, purpose, set()):
            raise ConfigError(message)
    return changed


def parse_set(text: str) -> tuple[str, Any]:
    """Key and value of `key=value` as YAML reads the value; the key may be dotted.

    What is not YAML is text, as in a shell: `--set prompt_end=@@`. Raises ConfigError.
    """
    path, equals, value = text.partition("=")
    path = path.strip().replace("-", "_")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {text}: write --set key=value, or --set block.key=value.")
    try:
        return path, source.parse_value(value)
    except source.Malformed as error:
        if value.lstrip()[:1] in tuple("[{\"'"):
            raise ConfigError(f"--set {path}={value}: {error}") from None
        return path, value


def _read_files(draft: Draft, files: Sequence[Path]) -> None:
    """Merge the files; what cannot be read ends the loading here, since all else depends on it."""
    unreadable: list[str] = []
    for file in files:
        try:
            document = source.read(file)
        except ConfigError as error:
            unreadable.append(str(error))
            continue
        if document.name in draft.texts:
            unreadable.append(
                f"two files are called {document.name}. Checkpoints keep both in one folder: "
                "rename one."
            )
            continue
        _merge(draft, document)
    if unreadable:
        draft.problems += [Problem(message) for message in unreadable]
        draft.finish()


def _merge(draft: Draft, document: source.Source) -> None:
    draft.texts[document.name] = document.text
    for path, first, second in document.duplicates:
        message = f"{path} stands here and on line {first}. Keep one of them."
        draft.problems.append(Problem(message, f"{document.name}:{second}"))
    for name, value in document.values.items():
        if name in draft.values:
            message = f"{name} is also given at {draft.origins[name]}. Keep one of them."
            draft.problems.append(Problem(message, f"{document.name}:{document.lines[name]}"))
            continue
        draft.values[name] = value
        for path, at in document.lines.items():
            if path == name or path.startswith(f"{name}."):
                draft.origins[path] = f"{document.name}:{at}"


def _override(draft: Draft, path: str, override: Override) -> None:
    """Put a value from the command line in place; blocks on the way are copied or made."""
    *parents, last = path.split(".")
    target = draft.values
    for depth, name in enumerate(parents):
        inner = target.get(name)
        if inner is not None and not isinstance(inner, dict):
            outer = ".".join(parents[: depth + 1])
            message = f"{path} cannot be set: {outer} is {show(inner)}, not a block of keys."
            draft.problems.append(Problem(message, override.origin))
            return
        target[name] = dict(inner or {})
        target = target[name]
    target[last] = override.value
    for known in [known for known in draft.origins if known.startswith(f"{path}.")]:
        del draft.origins[known]
    draft.origins[path] = override.origin


def _settle(draft: Draft, purpose: Purpose | None, world_size: WorldSize) -> NeoXConfig:
    """Check every value, derive what follows, run the cross checks; problems stay in `draft`."""
    hoist_extra_args(draft)
    accept_all(draft)
    adopt_folder(draft, training=purpose == "train")
    report_missing(draft)
    settle_precision(draft)
    settle_optimizer(draft)
    settle_packing(draft)
    settle_prompts(draft)
    config = _build(draft)
    if callable(world_size):
        try:
            devices = world_size(config)
            world_size = None if devices is None else settle_grid(draft, config, devices, purpose)
        except ConfigError as error:
            draft.problems.append(Problem(str(error)))
            draft.bad.add("world_size")
            world_size = None
        config = _build(draft)
    settle_sizes(draft, config, world_size, strict=purpose in ("train", "plan"))
    config = _build(draft)
    for checks in _CROSS_CHECKS:
        for key, message in list(checks.run(config, purpose, draft.bad)):
            draft.problem(key, message)
    for key, message in idle_keys(config, purpose):
        draft.warn(key, message)
    return config


def _build(draft: Draft) -> NeoXConfig:
    """The configuration as far as it is known; required keys that are bad hold None."""
    keys = keys_of(NeoXConfig)
    values: dict[str, Any] = {name: None for name, spec in keys.items() if spec.required}
    values |= {name: value for name, value in draft.values.items() if name in keys}
    return NeoXConfig(**values, config_files=dict(draft.texts), origins=dict(draft.origins))
