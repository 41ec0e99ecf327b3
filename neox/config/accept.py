"""Whether each value fits its declaration, and what becomes of it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox.config.config import NeoXConfig
from neox.config.draft import Draft, Problem
from neox.config.fields import Key, keys_of
from neox.config.legacy import explain_unknown
from neox.config.values import Misfit, fit, listed, show


def accept_all(draft: Draft) -> None:
    """Settle the type of every value; report what is unknown, unfit, refused or idle."""
    keys = keys_of(NeoXConfig)
    for name in list(draft.values):
        _accept_top(draft, name, keys)


def hoist_extra_args(draft: Draft) -> None:
    """A NeoX key inside deepspeed_extra_args means the same as outside; in both it is an error."""
    keys = keys_of(NeoXConfig)
    extra = draft.values.get("deepspeed_extra_args")
    if not isinstance(extra, dict):
        return
    for name, value in extra.items():
        if name not in keys or name == "deepspeed_extra_args":
            continue
        inside = f"deepspeed_extra_args.{name}"
        if name in draft.values:
            draft.problem(
                inside, f"{inside} is also given at {draft.origin(name)}. Keep one of them."
            )
            continue
        draft.values[name] = value
        for path in [p for p in draft.origins if p == inside or p.startswith(f"{inside}.")]:
            draft.origins[path.removeprefix("deepspeed_extra_args.")] = draft.origins[path]
    draft.values["deepspeed_extra_args"] = {k: v for k, v in extra.items() if k not in keys}


def _accept_top(draft: Draft, name: str, keys: Mapping[str, Key]) -> None:
    if name not in keys:
        draft.problem(name, explain_unknown(name, list(keys), "", NeoXConfig))
        del draft.values[name]
        return
    value = _accept(draft, name, draft.values[name], keys[name])
    if value is not None:
        draft.values[name] = value
        return
    del draft.values[name]
    if name not in draft.bad and not keys[name].required:
        draft.origins.pop(name, None)  # null, or not believed: the default stands


def _accept(draft: Draft, path: str, value: Any, spec: Key) -> Any:
    """The value as the key takes it, or None when it is not set, not believed or wrong."""
    if value is None:
        return None
    if spec.status == "derived":
        draft.warn(path, f"{path} is {show(value)}, which is not read: {spec.reason}.")
        return None
    try:
        value = fit(value, spec)
    except Misfit as misfit:
        draft.problem(path, f"{path} is {show(value)}, {misfit}")
        return None
    if spec.block is not None:
        value = accept_block(draft, path, spec.block, value)
    if spec.status == "refused" and not _is_off(value, spec):
        draft.problem(path, f"{path} is {show(value)}, which is refused: {spec.reason}.")
        return None
    if spec.status == "ignored" and not _is_off(value, spec):
        draft.warn(path, f"{path} is {show(value)}, which does nothing: {spec.reason}.")
    return value


def accept_block(draft: Draft, path: str, block: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of one block, each as its key takes it; unknown ones are reported and left out."""
    keys = keys_of(block)
    accepted = {}
    for name, value in values.items():
        if name in keys:
            accepted[name] = _accept(draft, f"{path}.{name}", value, keys[name])
        else:
            draft.problem(f"{path}.{name}", explain_unknown(name, list(keys), path, NeoXConfig))
    return accepted


def _is_off(value: Any, spec: Key) -> bool:
    """Whether a value asks for nothing beyond the default."""
    if value == spec.default:
        return True
    if isinstance(value, dict) and value.get("enabled") is False:
        return True
    return spec.default is None and value in (False, [], {}, "")


def report_missing(draft: Draft) -> None:
    """Report the required keys that have no value."""
    keys = keys_of(NeoXConfig)
    missing = [
        name
        for name, spec in keys.items()
        if spec.required and draft.values.get(name) is None and name not in draft.bad
    ]
    if len(missing) == 1:
        (name,) = missing
        draft.problem(name, f"{name} is missing. It is needed: {keys[name].doc}")
    elif missing:
        where = f" from {listed(draft.texts, 'and')}" if draft.texts else ""
        message = f"{listed(missing, 'and')} are missing{where}."
        advice = "Add a file that describes a model, such as configs/125M.yml."
        draft.problems.append(Problem(f"{message} {advice}"))
        draft.bad.update(missing)
