"""Numbers that would have worked, for messages to suggest."""

from __future__ import annotations

import math

from neox.config.values import listed

_LARGEST = 1 << 20  # no size in a model or a batch has a useful divisor beyond it
_MOST_OPTIONS = 12


def divisors(*numbers: int) -> list[int]:
    """The common divisors, ascending."""
    common = math.gcd(*numbers)
    return [d for d in range(1, min(common, _LARGEST) + 1) if common % d == 0]


def around(number: int, choices: list[int]) -> list[int]:
    """The choices (ascending) next to `number`: the one below and the one above."""
    below = [choice for choice in choices if choice < number]
    above = [choice for choice in choices if choice > number]
    return below[-1:] + above[:1]


def multiples_around(number: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to `number`."""
    below = number // unit * unit
    return [value for value in (below, below + unit) if value > 0]


def options(number: int, choices: list[int]) -> str:
    """The choices (ascending) in words; of many, those closest to `number`."""
    closest = sorted(choices, key=lambda choice: abs(choice - number))[:_MOST_OPTIONS]
    return listed(sorted(closest))
