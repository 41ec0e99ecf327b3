"""Tests of the page at `/` in a real browser; collected only where a Chromium is."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page import chromium
from tests.page.stub import PATIENCE, Stub

if chromium.PATH is None:
    collect_ignore_glob = ["test_*.py"]

expect.set_options(timeout=PATIENCE * 1000)


# Not for the session: its event loop must be gone when other tests begin one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.launched() as browser:
        yield browser


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page of a new profile. At the end it has met no error and asked its origin only."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    wrong: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # The browser reports answers of 4xx and 5xx itself; what scripts and policies report counts.
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text)
            if message.type == "error" and not message.text.startswith("Failed to load resource")
            else None
        ),
    )
    context.on("request", lambda request: asked.append(request.url))
    yield page
    origin = "{0.scheme}://{0.netloc}/".format(urlsplit(page.url))
    context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith((origin, "data:"))] == []
