"""Servers for the tests of downloads, and an environment without proxies and tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.server import BODY, Site, serving


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_ENDPOINT", "DATA_DIR", "NEOX_CORPORA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/w": BODY})) as site:
        yield site


@pytest.fixture
def mirror() -> Iterator[Site]:
    with serving(Site({"/w": BODY})) as site:
        yield site
