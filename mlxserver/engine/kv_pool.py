"""KV pool of one process: memory for the KV cache and the prefixes of all models, beside what is reserved for them.

A model's reservation holds its weights and a working set: the KV cache up to its `floor`. What it has beyond that, and
the prefixes of all models, come out of the pool.

Invariants
1. Reservations, KV cache beyond them, and prefixes stay within the limit. A claim is decided and recorded under one
   lock (engine/kv_claims.py decides).
2. The lock is taken before that of the prefixes, never the other way round, and nothing waits for the device under it.
3. Any thread may use the pool. An account is used on the engine thread of its model, which waits in wait() alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from mlxserver.engine.kv_claims import Demand, Outlook, Share, Verdict, can_have, grow, must_yield, start

_BORROWED = 2  # so many times what is borrowed must be free
WAIT_SECONDS = 0.05  # that an engine thread waits for memory before it looks into its mailbox again


class Prefixes(Protocol):
    """The prefixes of all models in memory. May be called on any thread."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries of all models until at most this many bytes are left."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Memory that is reserved for a model, in bytes. is_leaving: it is being unloaded."""

    bytes: int
    is_pinned: bool = False
    is_leaving: bool = False


class KVPool:
    """Ledger of what models hold beyond their reservations. Sizes in bytes.

    limit: of everything together; None until the manager sets one. on_pressure: called when a claim waits, on any
    thread.
    """

    def __init__(self, prefixes: Prefixes | None = None, wait_seconds: float = WAIT_SECONDS) -> None:
        self.lock = threading.RLock()
        self.prefixes = prefixes
        self.on_pressure: Callable[[], None] = lambda: None
        self.limit: int | None = None
        self.wait_seconds = wait_seconds
        self._changed = threading.Condition(self.lock)
        self._version = 0
        self._fixed = 0
        self._reserved: Mapping[str, Reserved] = {}
        self._accounts: list[KVAccount] = []
        self._prefix_bytes = 0
        self._storing = 0
        self._is_storing_awaited = False

    def open(self, key: str, floor: int) -> KVAccount:
        """Account of a model that is loaded, whose reservation holds `floor` bytes of KV cache. close() it."""
        account = KVAccount(self, key, floor)
        with self.lock:
            self._accounts.append(account)
        return account

    # -- for the manager ----------------------------------------------------------------------------------------

    def publish(self, limit: int, fixed: int, reserved: Mapping[str, Reserved]) -> None:
        """Set the limit and the reservations: `fixed` bytes in all, and those of each model by its key."""
        with self.lock:
            if (limit, fixed, reserved) != (self.limit, self._fixed, self._reserved):
                self.limit, self._fixed, self._reserved = limit, fixed, reserved
                self._notify()
            self._fit_prefixes()

    def over(self, key: str) -> int:
        """Bytes of KV cache that a model has beyond its reservation."""
        with self.lock:
            return sum(account.share.over for account in self._accounts if account.key == key)

    @property
    def total_over(self) -> int:
        """Bytes of KV cache that all models have beyond their reservations."""
        with self.lock:
            return sum(account.share.over for account in self._accounts)

    @property
    def live_bytes(self) -> int:
        """Bytes of KV cache that all models have, within their reservations and beyond."""
        with self.lock:
            return sum(account.live for account in self._accounts)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of all prefixes in memory, with those that are being stored."""
        with self.lock:
            return self._count_prefixes()

    @property
    def demands(self) -> list[tuple[KVAccount, Demand]]:
        """The demands that wait, the oldest first."""
        with self.lock:
            found = [(account, account.share.demand) for account in self._accounts]
        return sorted(
            ((account, demand) for account, demand in found if demand),
            key=lambda each: (not each[1].is_growth, each[1].since),
        )

    def is_had_without(self, account: KVAccount, demand: Demand) -> bool:
        """Whether the demand can be met in time although no model leaves: sequences end, or are preempted."""
        with self.lock:
            if demand.is_growth and account.share.sequences > 1:
                return True
            every = [other.share for other in self._accounts if not (demand.is_growth and other is account)]
            return can_have(demand, every, self._space())

    def answer(self, account: KVAccount, demand: Demand, outlook: Outlook) -> None:
        """Set the outlook of a demand, unless there is another one by now."""
        with self.lock:
            if account.share.demand == demand and demand.outlook is not outlook:
                account.share = replace(account.share, demand=replace(demand, outlook=outlook))
                self._notify()

    # -- prefixes -----------------------------------------------------------------------------------------------

    @contextmanager
    def storing(self, bytes: int) -> Iterator[bool]:
        """Make room for an entry of so many bytes, which the block stores. False: there is none.

        Claims and loads that need the room wait for the end of the block, and have it then.
        """
        with self.lock:
            fits = self.limit is None or bytes <= self._space() - self._storing
            if fits:
                self._storing += bytes
                self._fit_prefixes()
        try:
            yield fits
        finally:
            with self.lock:
                self._storing -= bytes if fits else 0
                self._count_prefixes()
                self._fit_prefixes()
                self._notify_of_storing()

    def stores_within(self, room: int) -> bool:
        """Whether what is being stored takes at most so many bytes. If not, on_pressure() is called behind it."""
        with self.lock:
            is_over = self._storing > max(0, room)
            self._is_storing_awaited |= is_over
            return not is_over

    def _notify_of_storing(self) -> None:
        if self._is_storing_awaited:
            self._is_storing_awaited = False
            self._notify()
            self.on_pressure()

    def _count_prefixes(self) -> int:
        """Update and return the bytes of prefixes; one that is being stored may be among them already, or not yet."""
        total = self.prefixes.total_bytes if self.prefixes else 0
        self._prefix_bytes = max(total, self._prefix_bytes) if self._storing else total
        return self._prefix_bytes

    def _fit_prefixes(self) -> None:
        """Drop prefixes until they fit; those that are being stored stay counted."""
        if self.limit is None or self.prefixes is None:
            return
        most = max(0, self._space())
        if self.prefixes.total_bytes + self._storing > most:
            self.prefixes.shrink(max(0, most - self._storing))
        self._prefix_bytes = min(self.prefixes.total_bytes + self._storing, max(most, self._storing))

    # -- under the lock -----------------------------------------------------------------------------------------

    def _space(self) -> int:
        """Bytes that are free once all prefixes are dropped."""
        assert self.limit is not None
        return self.limit - self._fixed - sum(account.share.over for account in self._accounts)

    def _others(self, account: KVAccount) -> list[Share]:
        return [other.share for other in self._accounts if other is not account]

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()


class KVAccount:
    """KV cache of one loaded model. Sizes in bytes.

    share: what other models' claims are decided by. floor: bytes of KV cache in the model's reservation.
    """

    def __init__(self, pool: KVPool, key: str, floor: int) -> None:
        self.key = key
        self.floor = floor
        self.share = Share()
        self._pool = pool
        self._live = 0
        self._lacking = 0
        self._seen = 0
        self._has_waited = False

    @property
    def live(self) -> int:
        """Bytes of KV cache that were granted."""
        return self._live

    @property
    def most_alone(self) -> int | None:
        """Bytes of KV cache that the model could have alone in the pool, beside pinned models; None for no limit."""
        pool = self._pool
        with pool.lock:
            if pool.limit is None:
                return None
            pinned = sum(each.bytes for key, each in pool._reserved.items() if each.is_pinned and key != self.key)
            own = pool._reserved.get(self.key, Reserved(self.floor)).bytes
            return max(self.floor, pool.limit - pinned - own + self.floor)

    def has_space(self, bytes: int) -> bool:
        """Whether so many bytes are there, once prefixes are dropped."""
        with self._pool.lock:
            return self._pool.limit is None or self._extra(bytes) <= max(0, self._pool._space())

    @contextmanager
    def borrowing(self, bytes: int) -> Iterator[bool]:
        """Have so many bytes for as long as the block runs, while no sequence has any. False: that would take more
        than half of what is free, with all prefixes left where they are.
        """
        pool = self._pool
        with pool.lock:
            over = max(0, bytes - self.floor)
            fits = pool.limit is None or not over or _BORROWED * over <= pool._space() - pool._count_prefixes()
            if fits:
                self.share = replace(self.share, over=over)
        try:
            yield fits
        finally:
            if fits and over:
                with pool.lock:
                    self.share = replace(self.share, over=0)
                    pool._notify()

    def start(self, bytes: int, sequences: int, arrived: float, now: float) -> bool:
        """Claim bytes for the model with one more prompt, which arrived then, and starts now."""
        with self._pool.lock:
            wanted = bytes if self.share.sequences else max(bytes, self._lacking)
            demand = self._demand(wanted, arrived, is_growth=False)
            if demand and start(self.share, self._pool._others(self), demand, self._pool._space()) is Verdict.WAITING:
                self._wait_for(demand)
                return False
            if demand and not self._fits_beside_stores(demand):
                return False
            self._record(bytes, sequences, now)
            return True

    def grow(self, bytes: int, sequences: int, youngest: float) -> Verdict:
        """Claim bytes for the running sequences, the youngest of which started then."""
        with self._pool.lock:
            demand = self._demand(bytes, youngest, is_growth=True)
            verdict, others = Verdict.GRANTED, self._pool._others(self)
            self.share = replace(self.share, sequences=sequences, youngest=youngest)
            if demand and must_yield(self.share, others, self._pool._space()):
                verdict = Verdict.PREEMPT
            elif demand:
                verdict = grow(self.share, others, demand, self._pool._space())
            if verdict is Verdict.WAITING and demand:
                self._wait_for(demand)
            elif verdict is Verdict.GRANTED and demand and not self._fits_beside_stores(demand):
                verdict = Verdict.WAITING
            elif verdict is Verdict.GRANTED:
                self._record(bytes, sequences, youngest)
            elif sequences <= 1:
                self._lacking = bytes
            return verdict

    def give_back(self, bytes: int, sequences: int, youngest: float) -> None:
        """Record that the model has no more than this. Running sequences claim anew what they need to grow."""
        with self._pool.lock:
            if bytes >= self._live and (sequences, youngest) == (self.share.sequences, self.share.youngest):
                return
            self._live = min(self._live, bytes)
            waiting = self.share.demand if self.share.demand and not self.share.demand.is_growth else None
            self.share = Share(max(0, self._live - self.floor), sequences, youngest, waiting)
            self._pool._notify()

    def withdraw(self) -> None:
        """No prompt waits any more."""
        if self.share.demand and not self.share.demand.is_growth:
            with self._pool.lock:
                self.share = replace(self.share, demand=None)
                self._lacking = 0
                self._pool._notify()

    def wait(self) -> None:
        """Wait for a change since the last claim, for a short time."""
        with self._pool.lock:
            self._has_waited = not self._pool._changed.wait_for(
                lambda: self._pool._version != self._seen, timeout=self._pool.wait_seconds
            )

    @property
    def is_stuck(self) -> bool:
        """Whether the model is being unloaded, and its waiting prompt does not fit beside the other models."""
        demand = self.share.demand
        if demand is None or demand.is_growth or self.share.sequences:
            return False
        with self._pool.lock:
            reserved = self._pool._reserved.get(self.key)
            is_leaving = reserved is None or reserved.is_leaving
            return is_leaving and not can_have(demand, self._pool._others(self), self._pool._space())

    def close(self) -> None:
        """Give everything back. Idempotent."""
        with self._pool.lock:
            if self in self._pool._accounts:
                self._pool._accounts.remove(self)
            self._live, self.share = 0, Share()
            self._pool._notify()

    def _extra(self, bytes: int) -> int:
        """Bytes out of the pool that the claim adds."""
        return max(0, bytes - self.floor) - self.share.over

    def _demand(self, bytes: int, since: float, *, is_growth: bool) -> Demand | None:
        """The claim as a demand, with the outlook of the same one if it waits already; None without a limit."""
        if self._pool.limit is None:
            return None
        demand, known = Demand(self._extra(bytes), since, is_growth), self.share.demand
        return known if known and replace(known, outlook=Outlook.UNKNOWN) == demand else demand

    def _fits_beside_stores(self, demand: Demand) -> bool:
        """Whether a demand leaves what is being stored its room; if not, the next one comes when it is stored."""
        self._seen = self._pool._version
        return demand.extra <= 0 or self._pool.stores_within(self._pool._space() - demand.extra)

    def _wait_for(self, demand: Demand) -> None:
        is_new = demand is not self.share.demand
        if is_new:
            self.share = replace(self.share, demand=demand)
            self._pool._notify()
        self._seen = self._pool._version
        if is_new or self._has_waited:
            self._has_waited = False
            self._pool.on_pressure()

    def _record(self, bytes: int, sequences: int, youngest: float) -> None:
        """Record a granted claim; prefixes make room for it."""
        is_waiting = self.share.demand is not None
        self._live, self._lacking = bytes, 0
        self.share = Share(max(0, bytes - self.floor), sequences, youngest)
        self._pool._fit_prefixes()
        if is_waiting:
            self._pool._notify()
