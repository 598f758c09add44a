"""The memory that the models share: who has some, who waits for some, and who leaves for whom.

Rule 1: decided in one plain step, recorded in the same: who was granted memory counts from then on, and who was chosen
        to leave counts no more. Two loads never take the same memory (manager/eviction.py decides).
Rule 2: what was granted is used only when those who leave are gone. If it is not there even then, because somebody has
        grown or the limit was lowered meanwhile, it is decided anew.
Rule 3: nobody polls: every change of a model, and the end of a time limit, leads to another look.
Rule 4: whether a model's memory is free again is measured: what is in memory beyond all that was granted, as an engine
        that ended badly may leave it, is not granted to anybody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mlxserver.engine.errors import LoadAborted, NoRoom
from mlxserver.manager.eviction import Granted, MemoryRequest, Postponed, Refused, Resident, Rules, decide


class MemoryHolder(Protocol):
    """A model, as the memory sees it."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def is_leaving(self) -> bool:
        """Whether it is on its way out, with its memory."""

    @property
    def waiting_since(self) -> float | None:
        """When the oldest request that waits for it came; None without one."""

    def resident(self, bytes: int) -> Resident:
        """How it stands, with this much memory."""

    def evict(self) -> None:
        """Make it leave, after its last request. It is leaving when this returns."""


@dataclass(eq=False)
class _Reservation:
    holder: MemoryHolder
    bytes: int
    granted: asyncio.Future[None]


class MemoryBudget:
    """The ledger of the memory. Used on one event loop. `rules` are asked for at every look: they may change.

    measure_arrays: bytes of all models' arrays that are in memory.
    """

    def __init__(self, rules: Callable[[], Rules], measure_arrays: Callable[[], int] = lambda: 0) -> None:
        self._rules = rules
        self._measure_arrays = measure_arrays
        self._ledger: dict[MemoryHolder, int] = {}  # granted, whether in use or not yet
        self._present: set[MemoryHolder] = set()  # those in use
        self._claims: list[_Reservation] = []
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.is_closed = False

    @property
    def reserved(self) -> int:
        """Bytes that are granted."""
        return sum(self._ledger.values())

    @property
    def budget(self) -> int:
        """Bytes that may be in use."""
        return self._rules().budget

    @property
    def unaccounted(self) -> int:
        """Bytes that are in use beyond those that are granted."""
        return max(0, self._measure_arrays() - self.reserved)

    def reserved_by(self, holder: MemoryHolder) -> int:
        """Bytes that a model was granted."""
        return self._ledger.get(holder, 0)

    async def reserve(self, holder: MemoryHolder, bytes: int) -> None:
        """Wait for memory; others may have to leave. With requests waiting, it is worth some time.

        Raises:
            NoRoom: it does not fit, even without those that can leave.
            LoadAborted: the server stops.
        """
        try:
            await self._granted(holder, bytes)
            while not self._is_free(bytes):
                if any(other.is_leaving for other in self._present):
                    self._changed.clear()
                    await self._changed.wait()
                else:
                    del self._ledger[holder]
                    await self._granted(holder, bytes)
            self._present.add(holder)
        except BaseException:
            self.release(holder)
            raise

    async def _granted(self, holder: MemoryHolder, bytes: int) -> None:
        """Wait until the ledger has a model's memory."""
        if self.is_closed:
            raise LoadAborted(holder.key)
        claim = _Reservation(holder, bytes, asyncio.get_running_loop().create_future())
        self._claims.append(claim)
        self.reconsider()
        try:
            await claim.granted
        finally:
            self._claims = [other for other in self._claims if other is not claim]

    def resize(self, holder: MemoryHolder, bytes: int) -> None:
        """A model turned out to take this much."""
        self._ledger[holder] = bytes
        self.reconsider()

    def release(self, holder: MemoryHolder) -> None:
        """A model's memory is free again."""
        self._ledger.pop(holder, None)
        self._present.discard(holder)
        self.reconsider()

    def close(self) -> None:
        """Grant nothing any more."""
        self.is_closed = True
        for claim in self._claims:
            if not claim.granted.done():
                claim.granted.set_exception(LoadAborted(claim.holder.key))
        self._claims = []

    def reconsider(self) -> None:
        """See whether somebody who waits can be given memory now."""
        self._changed.set()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        again = [self._settle(claim) for claim in sorted(self._claims, key=lambda c: c.holder.waiting_since or 0.0)]
        times = [moment for moment in again if moment is not None]
        if times and min(times) < float("inf"):
            delay = max(0.0, min(times) - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self.reconsider)

    def _settle(self, claim: _Reservation) -> float | None:
        """Decide on a claim and record it. Gives the time to look again, or None if it is settled."""
        residents = [holder.resident(bytes) for holder, bytes in self._ledger.items() if not holder.is_leaving]
        now = time.monotonic()
        rules = replace(self._rules(), budget=self._grantable)
        match decide(MemoryRequest(claim.bytes, claim.holder.waiting_since), residents, rules, now):
            case Granted(victims):
                self._ledger[claim.holder] = claim.bytes
                for victim in victims:
                    victim.evict()
            case Postponed(until):
                return until
            case Refused(projection):
                if not claim.granted.done():
                    claim.granted.set_exception(NoRoom(claim.holder.key, projection))
        self._claims.remove(claim)
        if not claim.granted.done():
            claim.granted.set_result(None)
        return None

    def _is_free(self, bytes: int) -> bool:
        """Whether so much that was granted is there, and nobody sits in it any more."""
        return sum(self._ledger.get(holder, 0) for holder in self._present) + bytes <= self._grantable

    @property
    def _grantable(self) -> int:
        return self.budget - self.unaccounted
