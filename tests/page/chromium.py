"""The browser that the page is tested in: Debian's Chromium, or what NEOX_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = os.environ.get("NEOX_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)

# It has no display and no GPU, talks to this machine only, and may be root's in a container.
_SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser with a new, empty profile. While it runs, so does an event loop here."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=_SWITCHES)
        yield browser
        browser.close()
