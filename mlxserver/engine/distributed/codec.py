"""Rows and their tokens as JSON, between the leader and the ranks that compute.

Rule: a constraint stays with the leader, where its request is. What computes asks there what its row may say.
"""

from __future__ import annotations

import base64
import math
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.sequence import Constraint, Logprobs, SampledToken, Sequence

Ask = Callable[[int, abc.Sequence[int]], bytes | None]  # row id, tokens since it was asked last -> what it may say


def encode_sequences(rows: abc.Sequence[Sequence]) -> dict[str, Any]:
    """Rows that share one prompt."""
    return {
        "tokens": rows[0].tokens,
        "rows": [
            {
                "id": row.id,
                "sampling": _encode_sampling(row.sampling),
                "max_tokens": row.max_tokens,
                "top_logprobs": row.top_logprobs,
                "is_bound": row.constraint is not None,
            }
            for row in rows
        ],
    }


def decode_sequences(content: Mapping[str, Any], ask: Ask | None) -> list[Sequence]:
    """The rows again. Without `ask`, for a rank that does not choose tokens: as if nothing were asked of them."""
    tokens = tuple(content["tokens"])
    if ask is None:
        return [Sequence(row["id"], tokens, SamplingParams(), row["max_tokens"]) for row in content["rows"]]
    return [
        Sequence(
            row["id"],
            tokens,
            _decode_sampling(row["sampling"]),
            row["max_tokens"],
            row["top_logprobs"],
            RemoteConstraint(row["id"], ask) if row["is_bound"] else None,
        )
        for row in content["rows"]
    ]


class RemoteConstraint:
    """A constraint that is elsewhere."""

    def __init__(self, sequence_id: int, ask: Ask) -> None:
        self._row_id = sequence_id
        self._ask = ask
        self._accepted: list[int] = []

    def allowed(self) -> bytes | None:
        """Ask what the row may say."""
        accepted, self._accepted = self._accepted, []
        return self._ask(self._row_id, accepted)

    def accept(self, token: int) -> None:
        """Tell it with the next question."""
        self._accepted.append(token)


def answer(constraint: Constraint, accepted: abc.Sequence[int]) -> str | None:
    """What a constraint says to a question, as JSON."""
    for token in accepted:
        constraint.accept(token)
    mask = constraint.allowed()
    return None if mask is None else base64.b64encode(mask).decode()


def decode_mask(text: str | None) -> bytes | None:
    """The mask again."""
    return None if text is None else base64.b64decode(text)


def encode_tokens(tokens: abc.Sequence[SampledToken]) -> list[list[Any]]:
    """Tokens of a step. JSON has no infinity: a log-probability of none is null."""
    return [
        [
            t.sequence_id,
            t.token,
            t.cached_tokens,
            [t.logprobs.chosen, t.logprobs.top] if t.logprobs else None,
            t.started,
        ]
        for t in tokens
    ]


def decode_tokens(content: abc.Sequence[abc.Sequence[Any]]) -> list[SampledToken]:
    """The tokens again."""
    return [
        SampledToken(sequence_id, token, cached, _decode_logprobs(logprobs), started)
        for sequence_id, token, cached, logprobs, started in content
    ]


def _decode_logprobs(content: abc.Sequence[Any] | None) -> Logprobs | None:
    if content is None:
        return None
    chosen, top = content
    return Logprobs(_finite(chosen), tuple((token, _finite(logprob)) for token, logprob in top))


def _finite(logprob: float | None) -> float:
    return -math.inf if logprob is None else logprob


def _encode_sampling(sampling: SamplingParams) -> dict[str, Any]:
    seed = None if sampling.seed is None else sampling.seed & (2**64 - 1)  # all that is used of it
    return asdict(replace(sampling, seed=seed)) | {"logit_bias": list(sampling.logit_bias.items())}


def _decode_sampling(content: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**{**content, "logit_bias": dict(content["logit_bias"])})
