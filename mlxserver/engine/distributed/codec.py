"""Sequences and sampled tokens as JSON, between the leader and the ranks that compute.

Rule: a constraint stays with the leader, where its request is. Rank 0 asks there for the token mask of a sequence.
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

Ask = Callable[[int, abc.Sequence[int]], bytes | None]  # sequence id, tokens accepted since the last call -> token mask


def encode_sequences(sequences: abc.Sequence[Sequence]) -> dict[str, Any]:
    """Sequences that share one prompt."""
    return {
        "tokens": sequences[0].tokens,
        "boundaries": sequences[0].boundaries,
        "prompt_logprobs": sequences[0].prompt_logprobs,
        "sequences": [
            {
                "id": sequence.id,
                "sampling": _encode_sampling(sequence.sampling),
                "max_tokens": sequence.max_tokens,
                "top_logprobs": sequence.top_logprobs,
                "is_constrained": sequence.constraint is not None,
            }
            for sequence in sequences
        ],
    }


def decode_sequences(content: Mapping[str, Any], ask: Ask | None) -> list[Sequence]:
    """Decoded sequences. Without `ask`, for a rank that does not sample: without sampling parameters."""
    tokens, shared = tuple(content["tokens"]), {"prompt_logprobs": content["prompt_logprobs"]}
    shared["boundaries"] = tuple(content["boundaries"])
    if ask is None:
        return [
            Sequence(each["id"], tokens, SamplingParams(), each["max_tokens"], **shared)
            for each in content["sequences"]
        ]
    return [
        Sequence(
            each["id"],
            tokens,
            _decode_sampling(each["sampling"]),
            each["max_tokens"],
            each["top_logprobs"],
            RemoteConstraint(each["id"], ask) if each["is_constrained"] else None,
            **shared,
        )
        for each in content["sequences"]
    ]


class RemoteConstraint:
    """Proxy of a constraint that stays with the leader."""

    def __init__(self, sequence_id: int, ask: Ask) -> None:
        self._sequence_id = sequence_id
        self._ask = ask
        self._accepted: list[int] = []

    def allowed(self) -> bytes | None:
        """The token mask; None allows every token."""
        accepted, self._accepted = self._accepted, []
        return self._ask(self._sequence_id, accepted)

    def accept(self, token: int) -> None:
        """Note a token, which is sent with the next question."""
        self._accepted.append(token)


def answer(constraint: Constraint, accepted: abc.Sequence[int]) -> str | None:
    """The token mask of a constraint after these tokens, for JSON."""
    for token in accepted:
        constraint.accept(token)
    mask = constraint.allowed()
    return None if mask is None else base64.b64encode(mask).decode()


def decode_mask(text: str | None) -> bytes | None:
    """Decoded token mask."""
    return None if text is None else base64.b64decode(text)


def encode_tokens(tokens: abc.Sequence[SampledToken]) -> list[list[Any]]:
    """Tokens of a step. JSON has no infinity: a log-probability of minus infinity is null."""
    return [
        [
            t.sequence_id,
            t.token,
            t.cached_tokens,
            _encode_logprobs(t.logprobs),
            t.started,
            None if t.prompt_logprobs is None else [_encode_logprobs(each) for each in t.prompt_logprobs],
        ]
        for t in tokens
    ]


def decode_tokens(content: abc.Sequence[abc.Sequence[Any]]) -> list[SampledToken]:
    """Decoded tokens of a step."""
    return [
        SampledToken(sequence_id, token, cached, _decode_logprobs(logprobs), started, _decode_prompt(of_prompt))
        for sequence_id, token, cached, logprobs, started, of_prompt in content
    ]


def _encode_logprobs(logprobs: Logprobs | None) -> list[Any] | None:
    return [logprobs.chosen, logprobs.top, logprobs.rank] if logprobs else None


def _decode_logprobs(content: abc.Sequence[Any] | None) -> Logprobs | None:
    if content is None:
        return None
    chosen, top, rank = content
    return Logprobs(_finite(chosen), tuple((token, _finite(logprob)) for token, logprob in top), rank)


def _decode_prompt(content: abc.Sequence[Any] | None) -> tuple[Logprobs, ...] | None:
    return None if content is None else tuple(filter(None, map(_decode_logprobs, content)))


def _finite(logprob: float | None) -> float:
    return -math.inf if logprob is None else logprob


def _encode_sampling(sampling: SamplingParams) -> dict[str, Any]:
    seed = None if sampling.seed is None else sampling.seed & (2**64 - 1)  # only these bits are used
    return asdict(replace(sampling, seed=seed)) | {"logit_bias": list(sampling.logit_bias.items())}


def _decode_sampling(content: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**{**content, "logit_bias": dict(content["logit_bias"])})
