"""The page on the server that it belongs to."""

from __future__ import annotations

from playwright.sync_api import Page

from tests.page.tour import walk
from tests.serving.fakes import FakeDecoder, serving, wait_until


def test_a_walk_through_the_page(page: Page) -> None:
    with serving(FakeDecoder(rows=2, step_s=0.01, end="")) as server:
        walk(page, server.url, 400)
        wait_until(lambda: server.decoder.idle)
        assert len(server.decoder.cancelled) == 1  # by the stop button
