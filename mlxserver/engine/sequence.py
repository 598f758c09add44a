"""Sequences, as the scheduler and the ranks exchange them. Plain frozen data, without MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlxserver.engine.requests import Sampling


class Constraint(Protocol):
    """What a row may say next, decided from what it has said. Runs on the engine thread, between two tokens."""

    def allowed(self) -> bytes | None:
        """A bit mask over the vocabulary, the lowest bit of each byte first, as long as those of all other rows; None
        allows every token.
        """

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence for the batch: the prompt's token ids and how to go on from there.

    said: how many of the last tokens the row itself generated before it had to wait again. max_tokens: from here on.
    """

    id: int
    tokens: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    said: int = 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position: the chosen token's, and the likeliest tokens with theirs."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One generated token of one row. cached_tokens is how much of its prompt the prefix cache had.

    started: when the row got its place, by time.monotonic().
    """

    sequence_id: int
    token: int
    cached_tokens: int = 0
    logprobs: Logprobs | None = None
    started: float = 0.0
