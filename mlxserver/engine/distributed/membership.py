"""The computing ranks as the leader knows them, and which of them hold the others up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlxserver.engine.distributed.link import Link, Message
from mlxserver.engine.errors import RankLost
from mlxserver.engine.metrics import RankReport


@dataclass(eq=False)
class Follower:
    """A computing rank. `error` says why it is lost; `heard` is when it said something last, by time.monotonic().

    Of its last heartbeat: the bytes that it holds, the messages that it has done with, the seconds that it has been at
    the present one, whether it is reading a model, when that came, and when the last one that said that it is.
    """

    rank: int
    address: str
    link: Link
    heard: float = field(default_factory=time.monotonic)
    memory_bytes: int = 0
    done: int = 0
    step_seconds: float = 0.0
    is_reading: bool = False
    beat_at: float = 0.0
    read_at: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        """For an error."""
        return f"{self.rank} ({self.address})"

    def note_heartbeat(self, heartbeat: Message) -> None:
        """Note how it says that it is."""
        self.memory_bytes, self.done = heartbeat["memory_bytes"], heartbeat["done"]
        self.step_seconds, self.is_reading = heartbeat["step_seconds"], heartbeat["is_reading"]
        self.beat_at = time.monotonic()
        if self.is_reading:
            self.read_at = self.beat_at

    def report(self) -> RankReport:
        """How it is now."""
        return RankReport(self.rank, self.address, self.error, self.memory_bytes, time.monotonic() - self.heard)


def stuck(followers: Sequence[Follower], limit: float) -> list[Follower]:
    """Those that have been at one step for longer than `limit` seconds, and for whom the others wait.

    Who has done less than another one waits for nobody. While a rank reads a model, all may have to wait for it.
    """
    if any(f.is_reading for f in followers):
        return []
    read_at = max(f.read_at for f in followers)  # until then, all may have waited for a rank that was reading
    seconds = {f: min(f.step_seconds, f.beat_at - read_at) for f in followers}
    if max(seconds.values()) <= limit:
        return []
    standing = [f for f in followers if seconds[f] > limit / 2]  # they tell of it one after the other
    least = min(f.done for f in standing)
    return [f for f in standing if f.done == least]


def loss(lost: Sequence[Follower], reason: str) -> RankLost:
    """What everybody is told."""
    names = " and ".join(f.name for f in lost)
    return RankLost(f"Ranks {names} are lost: {reason}" if len(lost) > 1 else f"Rank {names} is lost: {reason}")
