"""Which models have to leave so that another one fits. Pure: plain figures in, a decision out.

Rule 1: a pinned model never leaves, and nobody leaves in vain: without enough memory in the end, nobody does.
Rule 2: idle models leave first, the least recently used first of all.
Rule 3: a model in use leaves only for a request that waits, and only after min_residency, or once that request has
        waited for max_wait. It finishes what it has begun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.errors import Projection


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that has memory, or will have it in a moment. Sizes in bytes, times in seconds on one clock.

    holder: whose it is. is_movable: it is loaded and can be asked to leave, which one that is being loaded can't.
    """

    holder: Any
    bytes: int
    is_pinned: bool = False
    is_busy: bool = False
    is_movable: bool = True
    last_used: float = 0.0
    resident_since: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """MemoryBudget that is wanted. waiting_since None: nobody waits for it, so that no model in use has to leave."""

    bytes: int
    waiting_since: float | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What keeps models from pushing each other out all the time, in seconds; and the memory for all, in bytes."""

    budget: int
    min_residency: float
    max_wait: float


@dataclass(frozen=True, slots=True)
class Granted:
    """There is memory once these have left."""

    victims: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Postponed:
    """There may be memory later: ask again at this time at the latest, and whenever a model changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no memory."""

    projection: Projection


Decision = Granted | Postponed | Refused


def decide(demand: MemoryRequest, residents: Sequence[Resident], rules: Rules, now: float) -> Decision:
    """Whether there is memory for the demand, and who has to leave for it."""
    missing = demand.bytes - (rules.budget - sum(resident.bytes for resident in residents))
    idle = [o for o in residents if o.is_movable and not (o.is_pinned or o.is_busy)]
    if missing <= sum(o.bytes for o in idle):
        return Granted(_fewest(sorted(idle, key=lambda o: o.last_used), missing))
    in_use = [o for o in residents if o.is_busy and not o.is_pinned]
    if demand.waiting_since is None or missing > sum(o.bytes for o in (*idle, *in_use)):
        return Refused(project(demand.bytes, residents, rules.budget))
    patience_ends = demand.waiting_since + rules.max_wait
    ends = [min(o.resident_since + rules.min_residency, patience_ends) if o.is_movable else math.inf for o in in_use]
    due = [o for o, end in zip(in_use, ends, strict=True) if end <= now]
    if missing <= sum(o.bytes for o in (*idle, *due)):
        due.sort(key=lambda o: o.resident_since)
        return Granted(_fewest([*sorted(idle, key=lambda o: o.last_used), *due], missing))
    return Postponed(min((end for end in ends if end > now), default=math.inf))


def project(needed: int, residents: Sequence[Resident], budget: int) -> Projection:
    """The sizes that explain a refusal."""
    pinned = sum(o.bytes for o in residents if o.is_pinned)
    busy = sum(o.bytes for o in residents if o.is_busy and not o.is_pinned)
    held = sum(o.bytes for o in residents)
    return Projection(needed, max(0, budget - held), held - pinned - busy, pinned, busy, budget)


def _fewest(candidates: Sequence[Resident], missing: int) -> tuple[Any, ...]:
    """The first of the candidates that make up for what is missing, without those that turn out not to be needed."""
    chosen: list[Resident] = []
    for candidate in candidates:
        if sum(o.bytes for o in chosen) >= missing:
            break
        chosen.append(candidate)
    for resident in list(reversed(chosen)):
        if sum(o.bytes for o in chosen) - resident.bytes >= missing:
            chosen.remove(resident)
    return tuple(o.holder for o in chosen)
