"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.world import World

# Several processes share the cores: ranks, and pytest's own workers. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts us in the background has Ctrl-C ignored, also by all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Answers of evaluations are kept nowhere else, and not from one session to the next.
_CACHE = tempfile.TemporaryDirectory(prefix="neox-cache-")
os.environ["NEOX_CACHE"] = _CACHE.name


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """The session's pool of ranks: `world.run(n, fn, *args)`."""
    pool = World()
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers whatever this process has run before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes by their argument's name: an archive holds the time, and workers compare the names."""
    return argname if isinstance(val, bytes) else None
