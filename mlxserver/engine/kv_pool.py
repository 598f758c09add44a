"""KV pool of one process: memory for the KV cache and the prefixes of all models, beside what is reserved for them.

A model's reservation holds its weights and a working set: the KV cache up to its `floor`. What it has beyond that, and
the prefixes of all models, come out of the pool.

Invariants
1. Reservations, KV cache beyond them, and prefixes (engine/kv_prefixes.py) stay within the limit. A claim is decided
   and recorded under one lock (engine/kv_claims.py decides).
2. The lock is taken before that of the prefixes, never the other way round, and nothing waits for the device under it.
3. Any thread may use the pool. An account is used on the engine thread of its model, which waits in wait() alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mlxserver.engine.kv_claims import Claim, Outlook, Share, Verdict, can_have, grow, start
from mlxserver.engine.kv_prefixes import Prefixes, PrefixShare

_BORROWED = 2  # so many times what is borrowed must be free
WAIT_SECONDS = 0.05  # that an engine thread waits for memory before it looks into its mailbox again


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
        self.prefixes = PrefixShare(prefixes)
        self.on_pressure: Callable[[], None] = lambda: None
        self.limit: int | None = None
        self.wait_seconds = wait_seconds
        self._changed = threading.Condition(self.lock)
        self._version = 0
        self._fixed = 0
        self._reserved: Mapping[str, Reserved] = {}
        self._accounts: list[KVAccount] = []

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
            return self.prefixes.count()

    @property
    def waiting(self) -> list[tuple[KVAccount, Claim]]:
        """The claims that wait: those of running sequences, then those of prompts, the oldest first."""
        with self.lock:
            found = [(account, account.share.claim) for account in self._accounts]
        return sorted(
            ((account, claim) for account, claim in found if claim),
            key=lambda each: (not each[1].is_growth, each[1].since),
        )

    def is_met_in_time(self, account: KVAccount, claim: Claim) -> bool:
        """Whether a claim can be met although no model leaves: sequences end, or are preempted."""
        with self.lock:
            if claim.is_growth and account.share.sequences > 1:
                return True
            every = [other.share for other in self._accounts if not (claim.is_growth and other is account)]
            return can_have(claim, every, self._space())

    def set_outlook(self, account: KVAccount, claim: Claim, outlook: Outlook) -> None:
        """Set the outlook of a claim, unless another one waits by now."""
        with self.lock:
            if account.share.claim == claim and claim.outlook is not outlook:
                account.share = replace(account.share, claim=replace(claim, outlook=outlook))
                self._notify()

    # -- prefixes -----------------------------------------------------------------------------------------------

    @contextmanager
    def storing(self, bytes: int) -> Iterator[bool]:
        """Make room for an entry of so many bytes, which the block stores. False: there is none.

        Claims and loads that need the room wait for the end of the block, and have it then.
        """
        with self.lock:
            if fits := self.prefixes.begin(bytes, None if self.limit is None else self._space()):
                self._fit_prefixes()
        try:
            yield fits
        finally:
            with self.lock:
                was_awaited = self.prefixes.end(bytes if fits else 0)
                self._fit_prefixes()
                if was_awaited:
                    self._notify()
                    self.on_pressure()

    def stores_within(self, room: int) -> bool:
        """Whether what is being stored takes at most so many bytes. If not, on_pressure() is called behind it."""
        with self.lock:
            return self.prefixes.stores_within(room)

    # -- under the lock -----------------------------------------------------------------------------------------

    def _space(self) -> int:
        """Bytes that are free once all prefixes are dropped."""
        assert self.limit is not None
        return self.limit - self._fixed - sum(account.share.over for account in self._accounts)

    def _fit_prefixes(self) -> None:
        if self.limit is not None:
            self.prefixes.fit(max(0, self._space()))

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
            fits = pool.limit is None or not over or _BORROWED * over <= pool._space() - pool.prefixes.count()
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
            verdict = self._decide(start, self._claim(wanted, arrived, is_growth=False))
            if verdict is Verdict.GRANTED:
                self._record(bytes, sequences, now)
            return verdict is Verdict.GRANTED

    def grow(self, bytes: int, sequences: int, youngest: float) -> Verdict:
        """Claim bytes for the running sequences, the youngest of which started then."""
        with self._pool.lock:
            claim = self._claim(bytes, youngest, is_growth=True)
            self.share = replace(self.share, sequences=sequences, youngest=youngest)
            verdict = self._decide(grow, claim)
            if verdict is Verdict.GRANTED:
                self._record(bytes, sequences, youngest)
            elif verdict is Verdict.PREEMPT and sequences <= 1:
                self._lacking = bytes
            return verdict

    def give_back(self, bytes: int, sequences: int, youngest: float) -> None:
        """Record that the model has no more than this. Running sequences claim anew what they need to grow."""
        with self._pool.lock:
            if bytes >= self._live and (sequences, youngest) == (self.share.sequences, self.share.youngest):
                return
            self._live = min(self._live, bytes)
            waiting = self.share.claim if self.share.claim and not self.share.claim.is_growth else None
            self.share = Share(max(0, self._live - self.floor), sequences, youngest, waiting)
            self._pool._notify()

    def withdraw(self) -> None:
        """No prompt waits any more."""
        if self.share.claim and not self.share.claim.is_growth:
            with self._pool.lock:
                self.share = replace(self.share, claim=None)
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
        claim = self.share.claim
        if claim is None or claim.is_growth or self.share.sequences:
            return False
        with self._pool.lock:
            reserved = self._pool._reserved.get(self.key)
            is_leaving = reserved is None or reserved.is_leaving
            return is_leaving and not can_have(claim, self._pool._others(self), self._pool._space())

    def close(self) -> None:
        """Give everything back. Idempotent."""
        with self._pool.lock:
            if self in self._pool._accounts:
                self._pool._accounts.remove(self)
            self._live, self.share = 0, Share()
            self._pool._notify()

    # -- under the lock -----------------------------------------------------------------------------------------

    def _extra(self, bytes: int) -> int:
        """Bytes out of the pool that the claim adds."""
        return max(0, bytes - self.floor) - self.share.over

    def _claim(self, bytes: int, since: float, *, is_growth: bool) -> Claim:
        """A claim, with the outlook of the same one if it waits already."""
        claim, known = Claim(self._extra(bytes), since, is_growth), self.share.claim
        return known if known and replace(known, outlook=Outlook.UNKNOWN) == claim else claim

    def _decide(self, rule: Callable[[Share, Sequence[Share], Claim, int], Verdict], claim: Claim) -> Verdict:
        """Verdict on a claim. One that waits is recorded, unless it waits for what is being stored alone."""
        pool = self._pool
        if pool.limit is None:
            return Verdict.GRANTED
        self._seen, space = pool._version, pool._space()
        verdict = rule(self.share, pool._others(self), claim, space)
        if verdict is Verdict.WAITING:
            self._wait_for(claim)
        elif verdict is Verdict.GRANTED and claim.extra > 0 and not pool.stores_within(space - claim.extra):
            return Verdict.WAITING
        return verdict

    def _wait_for(self, claim: Claim) -> None:
        is_new = claim is not self.share.claim
        if is_new:
            self.share = replace(self.share, claim=claim)
            self._pool._notify()
        self._seen = self._pool._version
        if is_new or self._has_waited:
            self._has_waited = False
            self._pool.on_pressure()

    def _record(self, bytes: int, sequences: int, youngest: float) -> None:
        """Record a granted claim; prefixes make room for it."""
        has_waited = self.share.claim is not None
        self._live, self._lacking = bytes, 0
        self.share = Share(max(0, bytes - self.floor), sequences, youngest)
        self._pool._fit_prefixes()
        if has_waited:
            self._pool._notify()
