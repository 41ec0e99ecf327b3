"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """The session's pool of ranks: `world.run(n, fn, *args)`."""
    pool = World()
    yield pool
    pool.close()
