"""Shapes of the verifying steps of a decode batch: those that may be computed without a compilation.

Rule: where steps are compiled, a request waits for no verifying step to be: tokens are drafted in shapes that were
      rehearsed (scheduler/warm_up.py), and in no others.
"""

from __future__ import annotations

from mlxserver.engine.kv_cache.slot_cache import SlotCache


class VerifyingShapes:
    """Tokens of each sequence in a verifying step, at the present shape of the batch's cache.

    are_limited: to those that were computed before.
    """

    def __init__(self, cache: SlotCache, *, are_limited: bool) -> None:
        self.are_limited = are_limited
        self._cache = cache
        self._computed: dict[object, set[int]] = {}  # tokens, by the shape of the cache

    def note(self, tokens: int) -> None:
        """A step of so many tokens has been computed."""
        self._computed.setdefault(self._cache.shape, set()).add(tokens)

    def has_any(self) -> bool:
        """Whether there may be a step at all."""
        return not self.are_limited or self._cache.shape in self._computed

    def fits(self, tokens: int) -> bool:
        """Whether a step of so many tokens may be computed, and has room."""
        is_ready = not self.are_limited or tokens in self._computed.get(self._cache.shape, ())
        return is_ready and self._cache.fits(tokens)
