"""Memory budget of all models: their reservations, and the evictions that make room for them.

Invariants
1. A decision and its record are one plain step: a granted reservation counts at once, its victims no more. Two loads
   never take the same memory (manager/eviction.py decides).
2. A grant is used only once its victims have left. If the memory is not there even then, because a model grew or the
   limit was lowered meanwhile, the claim is decided anew.
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
            await self._budget.claim(self, bytes)
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
    """Bytes that a reservation waits for. outcome: done when they can be used, or are refused."""

    reservation: Reservation
    bytes: int
    outcome: asyncio.Future[None]

    @property
    def order(self) -> float:
        """Loads without a request come first, then requests in the order of their arrival."""
        return self.reservation.holder.waiting_since or 0.0


class MemoryBudget:
    """Ledger of all reservations. Used on one event loop. `rules` are read at every decision: a reload changes them.

    measure_arrays: bytes of all models' arrays in memory.
    """

    def __init__(self, rules: Callable[[], Rules], measure_arrays: Callable[[], int] = lambda: 0) -> None:
        self.is_closed = False
        self._rules = rules
        self._measure_arrays = measure_arrays
        self._granted: dict[Reservation, None] = {}
        self._claims: list[_Claim] = []
        self._timer: asyncio.TimerHandle | None = None

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

    def claim(self, reservation: Reservation, bytes: int) -> asyncio.Future[None]:
        """Claim memory. The future is done when it can be used; its exception is NoRoom or LoadAborted."""
        claim = _Claim(reservation, bytes, asyncio.get_running_loop().create_future())
        if self.is_closed:
            claim.outcome.set_exception(LoadAborted(reservation.holder.key))
        self._claims.append(claim)
        self.reconsider()
        return claim.outcome

    def reconsider(self) -> None:
        """Decide on every claim anew: something has changed."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._granted = {reservation: None for reservation in self._granted if reservation.bytes}
        self._claims = [claim for claim in self._claims if not claim.outcome.done()]
        times = [self._settle(claim) for claim in sorted(self._claims, key=lambda claim: claim.order)]
        if (soonest := min(times, default=math.inf)) < math.inf:
            delay = max(0.0, soonest - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self.reconsider)

    def close(self) -> None:
        """Refuse every claim from now on."""
        self.is_closed = True
        for claim in self._claims:
            if not claim.outcome.done():
                claim.outcome.set_exception(LoadAborted(claim.reservation.holder.key))

    def _settle(self, claim: _Claim) -> float:
        """Decide on a claim and record it. Time at which to decide again; inf: no earlier than at the next change."""
        reservation, holder = claim.reservation, claim.reservation.holder
        if not reservation.bytes:
            residents = [each.holder.resident(each.bytes) for each in self._granted if not each.holder.is_leaving]
            rules = replace(self._rules(), budget=self._grantable)
            match decide(MemoryRequest(claim.bytes, holder.waiting_since), residents, rules, time.monotonic()):
                case Postponed(until):
                    return until
                case Refused(projection):
                    claim.outcome.set_exception(NoRoom(holder.key, projection))
                    return math.inf
                case Granted(victims):
                    reservation.bytes = claim.bytes
                    self._granted[reservation] = None
                    for victim in victims:
                        victim.evict()
        in_use = [each for each in self._granted if each.is_in_use]
        if sum(each.bytes for each in in_use) + claim.bytes <= self._grantable:
            reservation.is_in_use = True
            claim.outcome.set_result(None)
        elif not any(each.holder.is_leaving for each in in_use):
            reservation.bytes = 0  # its victims have left, and the memory is not there
            return self._settle(claim)
        return math.inf

    @property
    def _grantable(self) -> int:
        return self.budget - self.unaccounted
