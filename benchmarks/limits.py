"""What the machine can do at best: the limits that speeds are shares of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import Turn

if TYPE_CHECKING:
    from torch import Tensor

BUFFER = 1 << 29  # bytes; many times any cache
SIDE = 2048  # of the matrices
SECONDS = 0.4  # that each way is tried for


@dataclass(frozen=True)
class Limits:
    """Of the threads that a contestant has."""

    read: float  # bytes/s from memory
    fp32: float  # operations/s of matrix products, an addition and a multiplication being two
    int8: float


def measure_limits() -> Turn:
    """A contestant that answers Limits, each the best of several ways; it is asked for anything."""
    import torch

    reads = list(_reads())
    w = torch.randn(SIDE, SIDE)
    x = torch.randn(SIDE, SIDE)
    fp32 = [partial(torch.mm, x, w)]
    if torch.backends.mkldnn.is_available():
        from neox.parallel.layers import linear

        fp32.append(partial(linear, x, w))
    int8 = list(_int8_products(x, w))

    def turn(order: Any) -> Limits:
        with torch.inference_mode():
            operations = 2 * SIDE**3
            return Limits(BUFFER * _rate(reads), operations * _rate(fp32), operations * _rate(int8))

    return turn


def _rate(ways: Iterable[Callable[[], object]]) -> float:
    """Calls per second of the fastest, in its fastest call."""
    best = float("inf")
    for way in ways:
        end = time.perf_counter() + SECONDS
        while (started := time.perf_counter()) < end:
            way()
            best = min(best, time.perf_counter() - started)
    return 1 / best


def _reads() -> Iterable[Callable[[], object]]:
    """Ways to read the buffer once: a sum, and the product of a matrix with a vector."""
    import torch

    buffer = torch.ones(BUFFER // 4)
    yield buffer.sum
    yield partial(torch.dot, buffer, buffer)
    yield partial(torch.mv, buffer.view(-1, SIDE), torch.ones(SIDE))


def _int8_products(x: Tensor, w: Tensor) -> Iterable[Callable[[], object]]:
    """Ways to multiply matrices of 8-bit numbers: torch's, and oneDNN's where it is."""
    import torch

    w = (w * 20).clamp(-127, 127).to(torch.int8)
    yield partial(torch._int_mm, (x * 20).clamp(-127, 127).to(torch.int8), w)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.onednn.qlinear_prepack(w, [SIDE, SIDE])
        scales, zeros = torch.full((SIDE,), 0.05), torch.zeros(SIDE, dtype=torch.int64)
        unsigned = (x * 20 + 128).clamp(0, 255).to(torch.uint8)
        weight = packed, scales, zeros, None  # no bias
        result = 1.0, 0, torch.float32, "none", [], ""  # scale, zero point, and nothing behind it
        yield partial(torch.ops.onednn.qlinear_pointwise, unsigned, 0.05, 128, *weight, *result)
