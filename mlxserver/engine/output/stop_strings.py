"""Stop strings: search in text that arrives in pieces.

Rule 1: text is held back only while it may still be the beginning of a stop string.
Rule 2: the match that is complete first wins, and of those the one that began first, so that any cut of the same text
        finds the same match.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxserver.engine.output.marked_text import TokenText


def overlap(text: str, wanted: str) -> int:
    """Length of the longest end of `text` that is a beginning of `wanted`, but not all of it."""
    start = text.find(wanted[:1], max(0, len(text) - len(wanted) + 1))
    while start >= 0:
        if wanted.startswith(text[start:]):
            return len(text) - start
        start = text.find(wanted[0], start + 1)
    return 0


class StopStrings:
    """Filter that passes text on up to the first stop string. Empty stop strings are ignored.

    matched: the stop string that was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = TokenText()
        self.matched: str | None = None

    def feed(self, text: TokenText | str) -> tuple[TokenText, bool]:
        """The text that can be passed on, and whether a stop string was found; nothing may be fed after one."""
        known = self._held + text
        if not self._stops:
            return known, False
        if cut := self._first_match(known.text):
            end, start = cut
            self.matched = known.text[start:end]
            self._held = TokenText()
            return known.cut(start)[0], True
        held = max((overlap(known.text, stop) for stop in self._stops), default=0)
        passed, self._held = known.cut(len(known) - held)
        return passed, False

    def flush(self) -> TokenText:
        """The text that is held back, at the end of the output."""
        text, self._held = self._held, TokenText()
        return text

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """End and start of the match that wins."""
        found = ((start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0)
        return min(found, default=None)
