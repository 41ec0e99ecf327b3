"""Text that ends before a stop string, wherever that is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through, piece by piece, up to the first stop string.

    The first is the one that is complete first; of several that end at the same place, the longest.
    So the text does not depend on the pieces. What may be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether it ended."""
        text = self._held + piece
        found = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                found.append((start + len(stop), start))
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        certain = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What was held back, which became no stop string."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop` the text ends with, short of all."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
