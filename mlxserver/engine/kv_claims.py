"""Decisions on claims to the KV pool. Pure: figures in, a verdict out. Sizes in bytes.

Under pressure, in this order: prefixes are dropped, idle models leave (the manager's part), new prompts wait, the
youngest sequences are preempted.

Invariants
1. A claim that waits holds nothing that an older one needs: of all that have memory of the pool, the sequence that
   started last is preempted first, whatever its model.
2. A prompt waits behind older ones that the pool could hold, and behind sequences that grow.
3. A model whose last sequence can't go on before others leave gives its memory back, so that these can end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """Outcome of a claim. PREEMPT: the model has to preempt its youngest sequence first."""

    GRANTED = "granted"
    WAITING = "waiting"
    PREEMPT = "preempt"


class Outlook(Enum):
    """What the manager has found for a claim that waits.

    COMING: idle models leave for it. LATER: there is no idle model, but one in use may leave, or sequences may end.
    NEVER: nothing can leave for it.
    """

    UNKNOWN = "unknown"
    COMING = "coming"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of one model. extra: bytes out of the pool, beyond those that the model has. is_growth: running sequences
    need them, the youngest of which started at `since`; otherwise a prompt does, which arrived then.
    """

    extra: int
    since: float
    is_growth: bool
    outlook: Outlook = Outlook.UNKNOWN


@dataclass(frozen=True, slots=True)
class Share:
    """What a model has of the pool: bytes beyond its reservation, sequences, the start of the youngest.

    claim: the one that waits.
    """

    over: int = 0
    sequences: int = 0
    youngest: float = -math.inf
    claim: Claim | None = None


def can_have(claim: Claim, others: Sequence[Share], space: int) -> bool:
    """Whether a claim could be met if the other models gave all back that they have of the pool."""
    return claim.extra <= space + sum(other.over for other in others)


def start(own: Share, others: Sequence[Share], claim: Claim, space: int) -> Verdict:
    """Whether a prompt may start. space: bytes that are free once all prefixes are dropped."""
    if claim.extra <= 0:
        return Verdict.GRANTED
    if any(_goes_first(other, claim, [own, *others], space) for other in others):
        return Verdict.WAITING
    if claim.extra <= space:
        return Verdict.GRANTED
    is_alone = not (own.sequences or any(other.over for other in others))
    return Verdict.GRANTED if is_alone and claim.outlook is Outlook.NEVER else Verdict.WAITING


def _goes_first(other: Share, claim: Claim, every: Sequence[Share], space: int) -> bool:
    """Whether another model's claim comes before that of a prompt."""
    waiting = other.claim
    if waiting is None or waiting.is_growth:
        return waiting is not None
    rest = [share for share in every if share is not other]
    return waiting.since < claim.since and can_have(waiting, rest, space)


def grow(own: Share, others: Sequence[Share], claim: Claim, space: int) -> Verdict:
    """Whether a model's running sequences may grow."""
    if must_yield(own, others, space):
        return Verdict.PREEMPT
    if claim.extra <= max(0, space):
        return Verdict.GRANTED
    if claim.outlook in (Outlook.UNKNOWN, Outlook.COMING):
        return Verdict.WAITING
    holders = [other for other in others if other.over > 0]
    if any(other.youngest > own.youngest for other in holders):
        return Verdict.WAITING  # must_yield() there
    if own.sequences > 1 or holders:
        return Verdict.PREEMPT
    if claim.outlook is Outlook.NEVER:
        return Verdict.GRANTED  # a limit was lowered, or a model pinned, since the request was taken
    is_awaited = any(_is_awaited_by(own, other) for other in others)
    return Verdict.PREEMPT if is_awaited else Verdict.WAITING


def _is_awaited_by(own: Share, other: Share) -> bool:
    """Whether another model can't end, and leave, before this one gives its memory back."""
    return other.claim is not None and (not other.claim.is_growth or other.youngest < own.youngest)


def must_yield(own: Share, others: Sequence[Share], space: int) -> bool:
    """Whether a model has the youngest sequence, and an older one of another model needs its memory."""
    if own.over <= 0 or any(other.over > 0 and other.youngest > own.youngest for other in others):
        return False
    return any(
        other.claim is not None
        and other.claim.is_growth
        and other.claim.outlook in (Outlook.LATER, Outlook.NEVER)
        and other.claim.extra > space
        and other.youngest < own.youngest
        for other in others
    )
