"""What the prefixes of all models have of the KV pool. Used under the pool's lock.

An entry is stored without that lock, since that may wait for the device. Until it is stored its bytes are counted,
whether the tier has it already or not yet.
"""

from __future__ import annotations

from typing import Protocol


class Prefixes(Protocol):
    """The prefixes of all models in memory. May be called on any thread."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries of all models until at most this many bytes are left."""


class PrefixShare:
    """Bytes of prefixes, and of entries that are being stored. tier: what has them, None for none."""

    def __init__(self, tier: Prefixes | None) -> None:
        self.tier = tier
        self._bytes = 0  # when they were last counted
        self._storing = 0
        self._is_awaited = False  # something waits for what is being stored

    def count(self) -> int:
        """Bytes of all, counted now."""
        total = self.tier.total_bytes if self.tier else 0
        self._bytes = max(total, self._bytes) if self._storing else total
        return self._bytes

    def fit(self, room: int) -> None:
        """Drop prefixes until they take at most so many bytes; those that are being stored stay."""
        if self.tier is None:
            return
        if self.tier.total_bytes + self._storing > room:
            self.tier.shrink(max(0, room - self._storing))
        self._bytes = min(self.tier.total_bytes + self._storing, max(room, self._storing))

    def begin(self, bytes: int, room: int | None) -> bool:
        """Begin to store an entry. False: there is no room for it. room: None for no limit."""
        if room is not None and bytes > room - self._storing:
            return False
        self._storing += bytes
        return True

    def end(self, bytes: int) -> bool:
        """An entry is stored, or was given up. Whether something has waited for that."""
        self._storing -= bytes
        self.count()
        was_awaited, self._is_awaited = self._is_awaited, False
        return was_awaited

    def stores_within(self, room: int) -> bool:
        """Whether what is being stored takes at most so many bytes. If not, it is awaited from now on."""
        is_over = self._storing > max(0, room)
        self._is_awaited |= is_over
        return not is_over
