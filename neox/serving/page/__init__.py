"""The page at `/`: three files that need nothing from elsewhere, and the headers they go with."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

# By the path that is asked for: the file and its media type.
FILES = {
    "/": (_FOLDER / "page.html", "text/html; charset=utf-8"),
    "/page.css": (_FOLDER / "page.css", "text/css; charset=utf-8"),
    "/page.js": (_FOLDER / "page.js", "text/javascript; charset=utf-8"),
}

# What a model writes is text to the page. Were it ever to become markup by a mistake, this would
# still let no script of it run and no word of it leave: scripts, styles and connections are the
# server's own, strings never become markup or scripts (Trusted Types), and no other site may frame
# the page. Only its icon is a data: URL.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)

HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the server has its own page at once
}
