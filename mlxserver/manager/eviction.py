"""Eviction: which models have to leave so that another one fits. Pure: figures in, a decision out.

Invariants
1. A pinned model is never evicted, and no model is evicted in vain: a refusal has no victims.
2. Idle models are evicted first, least recently used first.
3. A model in use is evicted only for a request that waits, and only after min_residency, or once that request has
   waited for max_wait. It finishes its running requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.errors import Projection


@dataclass(frozen=True, slots=True)
class Resident:
    """A model with granted memory. Sizes in bytes, times in seconds on one clock.

    holder: the model itself. is_evictable: whether it is loaded; one that is being loaded can't be evicted yet.
    """

    holder: Any
    bytes: int
    is_pinned: bool = False
    is_busy: bool = False
    is_evictable: bool = True
    last_used: float = 0.0
    resident_since: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """Memory that a load or a claim asks for.

    waiting_since: since when a request has waited for it; None where models in use stay, since no request waits, or it
    can be met without them.
    """

    bytes: int
    waiting_since: float | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits against thrashing, in seconds, and the budget of all models, in bytes."""

    budget: int
    min_residency: float
    max_wait: float


@dataclass(frozen=True, slots=True)
class Granted:
    """The memory is there once the victims have left."""

    victims: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Postponed:
    """The memory may be there later: decide again at this time at the latest, and whenever a model changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The memory is not there."""

    projection: Projection


Decision = Granted | Postponed | Refused


def decide(request: MemoryRequest, residents: Sequence[Resident], rules: Rules, now: float) -> Decision:
    """Whether the request gets its memory, and which models are evicted for it."""
    missing = request.bytes - (rules.budget - _total(residents))
    idle = [r for r in residents if r.is_evictable and not (r.is_pinned or r.is_busy)]
    if missing <= _total(idle):
        return Granted(_fewest(sorted(idle, key=lambda r: r.last_used), missing))
    in_use = [r for r in residents if r.is_busy and not r.is_pinned]
    if request.waiting_since is None or missing > _total([*idle, *in_use]):
        return Refused(project(request.bytes, residents, rules.budget))
    wait_ends = request.waiting_since + rules.max_wait
    ends = [min(r.resident_since + rules.min_residency, wait_ends) if r.is_evictable else math.inf for r in in_use]
    due = [r for r, end in zip(in_use, ends, strict=True) if end <= now]
    if missing <= _total([*idle, *due]):
        due.sort(key=lambda r: r.resident_since)
        return Granted(_fewest([*sorted(idle, key=lambda r: r.last_used), *due], missing))
    return Postponed(min((end for end in ends if end > now), default=math.inf))


def project(needed: int, residents: Sequence[Resident], budget: int) -> Projection:
    """The sizes that explain a refusal."""
    pinned = _total([r for r in residents if r.is_pinned])
    busy = _total([r for r in residents if r.is_busy and not r.is_pinned])
    held = _total(residents)
    return Projection(needed, max(0, budget - held), held - pinned - busy, pinned, busy, budget)


def _fewest(candidates: Sequence[Resident], missing: int) -> tuple[Any, ...]:
    """The first candidates that make up for the missing bytes, without those that turn out not to be needed."""
    chosen: list[Resident] = []
    for candidate in candidates:
        if _total(chosen) >= missing:
            break
        chosen.append(candidate)
    for resident in list(reversed(chosen)):
        if _total(chosen) - resident.bytes >= missing:
            chosen.remove(resident)
    return tuple(r.holder for r in chosen)


def _total(residents: Sequence[Resident]) -> int:
    return sum(resident.bytes for resident in residents)
