"""Membership: the computing ranks as the leader knows them, and which of them are stalled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlxserver.engine.distributed.link import Link, Message
from mlxserver.engine.errors import RankLost
from mlxserver.engine.metrics import RankReport


@dataclass(eq=False)
class Follower:
    """A computing rank. Times are those of time.monotonic().

    last_message_at: when its last message came. memory_bytes, done, step_seconds, is_reading: as of its last heartbeat,
    the memory of its arrays, the messages that it has processed, the duration of the present one so far, and whether
    it is reading a model. heartbeat_at, reading_at: when its last heartbeat came, and the last with is_reading set.
    error: why it is lost.
    """

    rank: int
    address: str
    link: Link
    last_message_at: float = field(default_factory=time.monotonic)
    memory_bytes: int = 0
    done: int = 0
    step_seconds: float = 0.0
    is_reading: bool = False
    heartbeat_at: float = 0.0
    reading_at: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        """Its name in errors."""
        return f"{self.rank} ({self.address})"

    def note_heartbeat(self, heartbeat: Message) -> None:
        """Record a heartbeat."""
        self.memory_bytes, self.done = heartbeat["memory_bytes"], heartbeat["done"]
        self.step_seconds, self.is_reading = heartbeat["step_seconds"], heartbeat["is_reading"]
        self.heartbeat_at = time.monotonic()
        if self.is_reading:
            self.reading_at = self.heartbeat_at

    def report(self) -> RankReport:
        """Its present state."""
        return RankReport(
            self.rank, self.address, self.error, self.memory_bytes, time.monotonic() - self.last_message_at
        )


def stalled(followers: Sequence[Follower], limit: float) -> list[Follower]:
    """The ranks that have been in one step for longer than `limit` seconds, and for which the others wait.

    A rank that has done less than another one waits for no other. While a rank reads a model, all may wait for it.
    """
    if any(f.is_reading for f in followers):
        return []
    reading_at = max(f.reading_at for f in followers)  # until then, all may have waited for a rank that was reading
    seconds = {f: min(f.step_seconds, f.heartbeat_at - reading_at) for f in followers}
    if max(seconds.values()) <= limit:
        return []
    waiting = [f for f in followers if seconds[f] > limit / 2]  # their heartbeats come one after the other
    least = min(f.done for f in waiting)
    return [f for f in waiting if f.done == least]


def rank_lost(lost: Sequence[Follower], reason: str) -> RankLost:
    """The error of everything that waits for these ranks."""
    names = " and ".join(f.name for f in lost)
    return RankLost(f"Ranks {names} are lost: {reason}" if len(lost) > 1 else f"Rank {names} is lost: {reason}")
