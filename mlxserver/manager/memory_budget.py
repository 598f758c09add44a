"""Memory budget of all models: their reservations, and the evictions that make room for them and for KV cache.

Invariants
1. A decision and its record are one plain step: a granted reservation counts at once, its victims no more. Two loads
   never take the same memory (manager/eviction.py decides).
2. A grant is used only once its victims have left. If the memory is not there even then, because a model grew or the
   limit was lowered meanwhile, it is decided anew.
3. No polling: every change of a model, and the end of a time limit, calls reconsider().
4. Freed memory is measured: bytes in use beyond all reservations, KV cache and prefixes, as an engine that ended badly
   may leave, are not granted.
5. Engines claim KV cache beyond their reservations on their own threads (engine/kv_pool.py): decisions are made and
   recorded under the pool's lock. Prefixes count as free: the pool drops them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from mlxserver.engine.errors import LoadAborted, NoRoom
from mlxserver.engine.kv_claims import Outlook
from mlxserver.engine.kv_pool import KVPool, Reserved
from mlxserver.manager.eviction import Granted, MemoryRequest, Postponed, Refused, Resident, Rules, decide
from mlxserver.manager.states import ModelState

Fits = Literal["now", "after_eviction", "never"]


class MemoryHolder(Protocol):
    """A model, as the budget sees it."""

    @property
    def key(self) -> str:
        """Name of the model."""

    @property
    def state(self) -> ModelState:
        """State of its lifecycle."""

    @property
    def waiting_since(self) -> float | None:
        """Arrival of the oldest request that waits for it, by time.monotonic(); None without one."""

    @property
    def is_pinned(self) -> bool:
        """Whether it is never evicted."""

    def resident(self, bytes: int) -> Resident:
        """Its figures for a decision, with this much memory."""

    def evict(self) -> None:
        """Start to unload it; it finishes its running requests. It is leaving when this returns."""


class Reservation:
    """Memory of one model. Used on one event loop.

    wanted: bytes that a load waits for. bytes: granted to it; 0 without a grant. is_in_use: whether the victims of the
    grant have left. outcome: done once the memory is in use, or refused.
    """

    def __init__(self, holder: MemoryHolder, budget: MemoryBudget) -> None:
        self.holder = holder
        self.wanted = 0
        self.bytes = 0
        self.is_in_use = False
        self.outcome: asyncio.Future[None] | None = None
        self._budget = budget

    @property
    def is_pending(self) -> bool:
        """Whether a load waits for it."""
        return self.outcome is not None and not self.outcome.done()

    def leaves_room(self, bytes: int) -> bool:
        """Whether a model of so many bytes would take at most half of the memory that is free without evictions."""
        return 2 * bytes <= self._budget.free

    async def acquire(self, bytes: int) -> None:
        """Wait for memory; other models may be evicted. With requests waiting for the model, this may take some time.

        release() it, also after an error.

        Raises:
            NoRoom: it does not fit, whatever can be evicted.
            LoadAborted: the server stops.
        """
        if self._budget.is_closed:
            raise LoadAborted(self.holder.key)
        self.wanted = bytes
        self.outcome = asyncio.get_running_loop().create_future()
        self._budget.reservations[self] = None
        self._budget.listen()
        self._budget.reconsider()
        await self.outcome

    def resize(self, bytes: int) -> None:
        """Correct the size of a reservation that is in use."""
        self.bytes = bytes
        self._budget.reconsider()

    def release(self) -> None:
        """Give the memory back."""
        self.bytes = 0
        self.is_in_use = False
        self._budget.reservations.pop(self, None)
        self._budget.reconsider()


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes at one moment: that models hold, with the KV cache beyond their reservations; of the prefixes of all
    models; and of KV cache, within reservations and beyond.
    """

    held: int
    prefixes: int
    live_kv: int


class MemoryBudget:
    """Ledger of all reservations. Used on one event loop. `rules` are read at every decision: a reload changes them.

    measure_arrays: bytes of all models' arrays in memory. pool: what engines hold beyond their reservations.
    """

    def __init__(
        self,
        rules: Callable[[], Rules],
        measure_arrays: Callable[[], int] = lambda: 0,
        pool: KVPool | None = None,
    ) -> None:
        self.reservations: dict[Reservation, None] = {}
        self.is_closed = False
        self._rules = rules
        self._measure_arrays = measure_arrays
        self._pool = pool or KVPool()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def reserved(self) -> int:
        """Bytes that all models hold, with the KV cache beyond their reservations."""
        return self._in_use + self._pool.total_over

    @property
    def use(self) -> MemoryUse:
        """What is in use. Engines turn KV cache into prefixes meanwhile: figures of two moments do not add up."""
        with self._pool.lock:
            return MemoryUse(self.reserved, self._pool.prefix_bytes, self._pool.live_bytes)

    def held(self, reservation: Reservation) -> int:
        """Bytes granted to one model, with the KV cache that it has beyond its reservation."""
        return reservation.bytes + (self._pool.over(reservation.holder.key) if reservation.bytes else 0)

    @property
    def budget(self) -> int:
        """Bytes that all models may take."""
        return self._rules().budget

    @property
    def unaccounted(self) -> int:
        """Bytes in use beyond all reservations, KV cache and prefixes."""
        use = self.use
        return max(0, self._measure_arrays() - use.held - use.prefixes)

    @property
    def free(self) -> int:
        """Bytes that a load could take without evicting a model."""
        return self._grantable - self.reserved

    def fits(self, bytes: int) -> Fits:
        """Whether a model of so many bytes could be loaded now, after evictions, or never."""
        pinned = sum(self.held(each) for each in self.reservations if each.holder.is_pinned)
        if bytes <= self.free:
            return "now"
        return "after_eviction" if bytes <= self._grantable - pinned else "never"

    def reconsider(self) -> None:
        """Decide on every pending reservation anew, and on every claim that waits: something has changed.

        Claims come first, then loads without a request, then requests in the order of their arrival.
        """
        if self._timer:
            self._timer.cancel()
            self._timer = None
        pending = sorted(
            (each for each in self.reservations if each.is_pending), key=lambda each: each.holder.waiting_since or 0.0
        )
        with self._pool.lock:
            self._publish()
            soonest = min([*self._answer_claims(), *(self._settle(each) for each in pending)], default=math.inf)
            self._publish()
        if soonest < math.inf:
            delay = max(0.0, soonest - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self.reconsider)

    def listen(self) -> None:
        """Decide anew whenever an engine's claim waits."""
        loop = asyncio.get_running_loop()

        def on_pressure() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.reconsider)

        self._pool.on_pressure = on_pressure

    def close(self) -> None:
        """Refuse every pending reservation, and every one from now on."""
        self.is_closed = True
        for each in self.reservations:
            if each.outcome and each.is_pending:
                each.outcome.set_exception(LoadAborted(each.holder.key))

    def _settle(self, pending: Reservation) -> float:
        """Decide on a reservation and record it. Time to decide again; inf: no earlier than at the next change."""
        assert pending.outcome is not None
        if not pending.bytes:
            request = MemoryRequest(pending.wanted, pending.holder.waiting_since)
            residents = [each.holder.resident(self.held(each)) for each in self._staying]
            match decide(request, residents, replace(self._rules(), budget=self._grantable), time.monotonic()):
                case Postponed(until):
                    return until
                case Refused(projection):
                    pending.outcome.set_exception(NoRoom(pending.holder.key, projection))
                    return math.inf
                case Granted(victims):
                    pending.bytes = pending.wanted
                    for victim in victims:
                        victim.evict()
        in_use = [each for each in self.reservations if each.is_in_use]
        room = self._grantable - self._in_use - self._pool.total_over - pending.bytes
        if room >= 0:
            if self._pool.stores_within(room):  # or else it is decided anew when that is stored
                pending.is_in_use = True
                pending.outcome.set_result(None)
        elif not any(each.holder.state.is_leaving for each in in_use):
            pending.bytes = 0  # its victims have left, and the memory is not there
            return self._settle(pending)
        return math.inf

    # -- the pool -------------------------------------------------------------------------------------------------

    def _answer_claims(self) -> Iterator[float]:
        """Evict models for the claims that wait, and tell the pool what comes of it. Times to decide again."""
        promised = 0
        for account, claim in self._pool.waiting:
            residents = [
                each.holder.resident(self.held(each)) for each in self._staying if each.holder.key != account.key
            ]
            own = [each for each in self._staying if each.holder.key == account.key]
            if not own:  # it is being unloaded: its requests end, one way or another
                self._pool.set_outlook(account, claim, Outlook.LATER)
                continue
            fits_in_time = self._pool.is_met_in_time(account, claim)
            request = MemoryRequest(claim.extra, None if fits_in_time else claim.since)
            budget = self._grantable - promised - sum(self.held(each) for each in own)
            match decide(request, residents, replace(self._rules(), budget=budget), time.monotonic()):
                case Postponed(until):
                    self._pool.set_outlook(account, claim, Outlook.LATER)
                    yield until
                case Refused():
                    self._pool.set_outlook(account, claim, Outlook.LATER if fits_in_time else Outlook.NEVER)
                case Granted(victims):
                    promised += claim.extra
                    self._pool.set_outlook(account, claim, Outlook.COMING)
                    for victim in victims:
                        victim.evict()

    def _publish(self) -> None:
        """Tell the pool what is reserved: now, and once the models that are leaving have left, whichever is more."""
        later = sum(each.bytes for each in self._staying)
        reserved = {
            each.holder.key: Reserved(each.bytes, each.holder.is_pinned, each.holder.state.is_leaving)
            for each in self.reservations
            if each.bytes
        }
        self._pool.publish(self._grantable, max(self._in_use, later), reserved)

    @property
    def _in_use(self) -> int:
        return sum(each.bytes for each in self.reservations if each.is_in_use)

    @property
    def _staying(self) -> list[Reservation]:
        """Reservations that were granted to models that are not leaving."""
        return [each for each in self.reservations if each.bytes and not each.holder.state.is_leaving]

    @property
    def _grantable(self) -> int:
        return self.budget - self.unaccounted
