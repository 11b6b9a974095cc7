"""Stop strings that the server does not look for. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    "First" is the one whose last character comes first, ties going to the longest, as servers do that look after
    every token.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (text to pass on, whether a stop string was met)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            passed, self._held = self._held[: min(found)[1]], ""
            return passed, True
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed, False

    def flush(self) -> str:
        """What was held back, when no more text can come."""
        held, self._held = self._held, ""
        return held
