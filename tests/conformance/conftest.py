"""Tests against genuine upstream output; collected only where that output is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("NEOX_SHARED", Path(__file__).parents[2].parent / "shared"))

if not SHARED.is_dir():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with upstream's checkpoints, reference values and data."""
    return SHARED
