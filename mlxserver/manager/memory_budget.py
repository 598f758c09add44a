"""Memory budget of all models: their reservations, and the evictions that make room for them.

Invariants
1. A decision and its record are one plain step: a granted reservation counts at once, its victims no more. Two loads
   never take the same memory (manager/eviction.py decides).
2. A grant is used only once its victims have left. If the memory is not there even then, because a model grew or the
   limit was lowered meanwhile, it is decided anew.
3. No polling: every change of a model, and the end of a time limit, calls reconsider().
4. Freed memory is measured: bytes in use beyond all reservations, as an engine that ended badly may leave, are not
   granted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mlxserver.engine.errors import LoadAborted, NoRoom
from mlxserver.manager.eviction import Granted, MemoryRequest, Postponed, Refused, Resident, Rules, decide


class MemoryHolder(Protocol):
    """A model, as the budget sees it."""

    @property
    def key(self) -> str:
        """Name of the model."""

    @property
    def is_leaving(self) -> bool:
        """Whether it is being unloaded, and its memory with it."""

    @property
    def waiting_since(self) -> float | None:
        """Arrival of the oldest request that waits for it, by time.monotonic(); None without one."""

    def resident(self, bytes: int) -> Resident:
        """Its figures for a decision, with this much memory."""

    def evict(self) -> None:
        """Start to unload it; it finishes its running requests. It is leaving when this returns."""


class Reservation:
    """Memory of one model. Used on one event loop.

    bytes: granted; 0 without a grant. is_in_use: whether the victims of the grant have left.
    """

    def __init__(self, holder: MemoryHolder, budget: MemoryBudget) -> None:
        self.holder = holder
        self.bytes = 0
        self.is_in_use = False
        self._budget = budget

    async def acquire(self, bytes: int) -> None:
        """Wait for memory; other models may be evicted. With requests waiting for the model, this may take some time.

        Raises:
            NoRoom: it does not fit, whatever can be evicted.
            LoadAborted: the server stops.
        """
        try:
            await self._budget.grant(self, bytes)
            while not self._budget.is_free(self):
                if self._budget.has_departures:
                    await self._budget.change()
                else:
                    self.bytes = 0
                    await self._budget.grant(self, bytes)
            self.is_in_use = True
        except BaseException:
            self.release()
            raise

    def resize(self, bytes: int) -> None:
        """Correct the size of a reservation that is in use."""
        self.bytes = bytes
        self._budget.reconsider()

    def release(self) -> None:
        """Give the memory back."""
        self.bytes = 0
        self.is_in_use = False
        self._budget.reconsider()


@dataclass(eq=False, slots=True)
class _Claim:
    """A reservation that waits for its grant."""

    reservation: Reservation
    bytes: int
    granted: asyncio.Future[None]

    @property
    def order(self) -> float:
        """Loads without a request come first, then requests in the order of their arrival."""
        return self.reservation.holder.waiting_since or 0.0


class MemoryBudget:
    """Ledger of all reservations. Used on one event loop. `rules` are read at every decision: a reload changes them.

    measure_arrays: bytes of all models' arrays in memory.
    """

    def __init__(self, rules: Callable[[], Rules], measure_arrays: Callable[[], int] = lambda: 0) -> None:
        self._rules = rules
        self._measure_arrays = measure_arrays
        self._granted: dict[Reservation, None] = {}
        self._claims: list[_Claim] = []
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.is_closed = False

    @property
    def reserved(self) -> int:
        """Bytes granted to all models."""
        return sum(reservation.bytes for reservation in self._granted)

    @property
    def budget(self) -> int:
        """Bytes that all models may take."""
        return self._rules().budget

    @property
    def unaccounted(self) -> int:
        """Bytes in use beyond all reservations."""
        return max(0, self._measure_arrays() - self.reserved)

    @property
    def has_departures(self) -> bool:
        """Whether a model with memory is being unloaded."""
        return any(reservation.is_in_use and reservation.holder.is_leaving for reservation in self._granted)

    def is_free(self, granted: Reservation) -> bool:
        """Whether the memory of a grant is there, its victims having left."""
        in_use = sum(reservation.bytes for reservation in self._granted if reservation.is_in_use)
        return in_use + granted.bytes <= self._grantable

    async def grant(self, reservation: Reservation, bytes: int) -> None:
        """Wait until this much is granted. Raises NoRoom, LoadAborted."""
        if self.is_closed:
            raise LoadAborted(reservation.holder.key)
        claim = _Claim(reservation, bytes, asyncio.get_running_loop().create_future())
        self._claims.append(claim)
        self.reconsider()
        await claim.granted

    async def change(self) -> None:
        """Wait for the next change of any model."""
        self._changed.clear()
        await self._changed.wait()

    def reconsider(self) -> None:
        """Decide on every claim anew: something has changed."""
        self._changed.set()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._granted = {reservation: None for reservation in self._granted if reservation.bytes}
        self._claims = [claim for claim in self._claims if not claim.granted.done()]  # one may have been cancelled
        times = [self._settle(claim) for claim in sorted(self._claims, key=lambda claim: claim.order)]
        if (soonest := min(times, default=math.inf)) < math.inf:
            delay = max(0.0, soonest - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self.reconsider)

    def close(self) -> None:
        """Refuse every claim from now on."""
        self.is_closed = True
        for claim in self._claims:
            if not claim.granted.done():
                claim.granted.set_exception(LoadAborted(claim.reservation.holder.key))

    def _settle(self, claim: _Claim) -> float:
        """Decide on a claim and record it. Time at which to decide again; inf: no earlier than at the next change."""
        holder = claim.reservation.holder
        residents = [each.holder.resident(each.bytes) for each in self._granted if not each.holder.is_leaving]
        rules = replace(self._rules(), budget=self._grantable)
        match decide(MemoryRequest(claim.bytes, holder.waiting_since), residents, rules, time.monotonic()):
            case Postponed(until):
                return until
            case Refused(projection):
                claim.granted.set_exception(NoRoom(holder.key, projection))
            case Granted(victims):
                claim.reservation.bytes = claim.bytes
                self._granted[claim.reservation] = None
                for victim in victims:
                    victim.evict()
                claim.granted.set_result(None)
        return math.inf

    @property
    def _grantable(self) -> int:
        return self.budget - self.unaccounted
