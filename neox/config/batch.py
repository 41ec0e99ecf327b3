"""train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x replicas."""

from __future__ import annotations

from neox.config.arithmetic import around, divisors, multiples_around
from neox.config.draft import Draft
from neox.config.values import listed

TRAIN, MICRO, STEPS = KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def implied_replicas(draft: Draft) -> int:
    """Replicas that the three sizes call for, when nothing else says how many there are."""
    train, micro, steps = (draft.values.get(key) for key in KEYS)
    if train is None or micro is None or draft.bad.intersection(KEYS):
        return 1
    return max(1, train // (micro * (steps or 1)))


def settle_batch(draft: Draft, replicas: int, layout: str, *, strict: bool) -> None:
    """Resolve the three sizes from any sufficient subset of them.

    `layout` tells how `replicas` came about. Unless `strict` (only training needs the equation to
    hold) sizes that don't fit are made to.
    """
    if draft.bad.intersection(KEYS):
        return
    given = {key: draft.values[key] for key in KEYS if key in draft.values}
    train, micro, steps = (given.get(key) for key in KEYS)
    if strict:
        problem = _problem(draft, given, replicas, layout)
        if problem:
            draft.problem(_blamed(given), problem)
            return
    if train is not None and micro is None:
        micro = max(1, train // ((steps or 1) * replicas))
    elif train is not None and micro is not None and steps is None:
        steps = max(1, train // (micro * replicas))
    micro, steps = micro or 1, steps or 1
    for key, value in zip(KEYS, (micro * steps * replicas, micro, steps), strict=True):
        draft.settle(key, value)


def _blamed(given: dict[str, int]) -> str:
    return next((key for key in KEYS if key in given), MICRO)


def _problem(draft: Draft, given: dict[str, int], replicas: int, layout: str) -> str | None:
    """What is wrong with the sizes that are given, None when nothing is."""
    if TRAIN not in given and MICRO not in given:
        return (
            f"{MICRO} is missing. Give it, or {TRAIN}: how many samples a forward pass takes, or "
            "an optimizer step."
        )
    if TRAIN not in given:
        return None
    train = given[TRAIN]
    factors = [key for key in (MICRO, STEPS) if key in given]
    unit = replicas
    for key in factors:
        unit *= given[key]
    if train == unit or (len(factors) < 2 and train % unit == 0):
        return None
    product = " x ".join([*(f"{key} ({_said(draft, key)})" for key in factors), layout])
    ways = [f"set {TRAIN} to {listed(_around(train, unit, len(factors)))}"]
    if len(factors) == 2:
        relation = f"but {product} is {unit}"
        if train % (given[MICRO] * replicas) == 0:
            ways.append(f"{STEPS} to {train // (given[MICRO] * replicas)}")
        if train % (given[STEPS] * replicas) == 0:
            ways.append(f"{MICRO} to {train // (given[STEPS] * replicas)}")
    else:
        relation = f"but that is not divisible by {product}{f' = {unit}' if factors else ''}"
        if factors and train % replicas == 0:
            values = around(given[factors[0]], divisors(train // replicas))
            ways.append(f"{factors[0]} to {listed(values)}")
    advice = listed(ways)
    return f"{TRAIN} is {train}, {relation}. {advice[0].upper()}{advice[1:]}."


def _said(draft: Draft, key: str) -> str:
    origin = draft.origin(key)
    value = str(draft.values[key])
    return f"{value}, {origin}" if ":" in origin or draft.from_command_line(key) else value


def _around(train: int, unit: int, factors: int) -> list[int]:
    """The batch sizes next to `train` that work."""
    if factors == 2:
        return [unit]
    return multiples_around(train, unit)
