"""Sequences, as the scheduler and the ranks exchange them. Plain frozen data, without MLX."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.events import PromptProgress


class Constraint(Protocol):
    """Allowed next tokens of one sequence, from the tokens it has generated. Runs on the engine thread."""

    def allowed(self) -> bytes | None:
        """A bit mask over the vocabulary, lowest bit of each byte first, of one length for all sequences; None allows
        every token.
        """

    def accept(self, token: int) -> None:
        """Advance by the sampled token."""


class PromptImages(Protocol):
    """Images of one prompt. Runs on the engine thread. shift: positions of the tokens behind the prompt differ from
    their offsets by so much.
    """

    shift: int

    def keys(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt's first tokens, or all with generated ones, each image's with its key in place of its tokens."""

    def encode(self, start: int, end: int) -> bool:
        """Compute the features of one image that has a part in these tokens. False: they are all at hand."""

    def whole(self, start: int, end: int) -> int:
        """Where a chunk of these tokens should end, so that it has no part of an image that has to be seen at once."""

    def showing(self, start: int, end: int) -> AbstractContextManager[None]:
        """A forward pass of these tokens in the block sees the images."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence to generate: the prompt's token ids, and how to go on from there.

    num_generated: how many of the last tokens were generated before the sequence was preempted. max_tokens: most tokens
    to generate from here on. boundaries: lengths at which another prompt is likely to differ. progress: where the
    progress of its prompt is reported. prompt_logprobs: how many of the likeliest tokens are measured at each position
    of the prompt beside its own token, None for no measurement. second_text: number of the first token of the second
    text, in a pair of texts for a reranker that tells them apart; 0 elsewhere. images: those that its prompt has.
    """

    id: int
    tokens: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    num_generated: int = 0
    boundaries: tuple[int, ...] = ()
    progress: PromptProgress | None = field(default=None, compare=False, repr=False)
    prompt_logprobs: int | None = None
    second_text: int = 0
    images: PromptImages | None = field(default=None, compare=False, repr=False)

    def keys(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """What the KV cache of its first tokens is stored under."""
        return self.images.keys(tokens) if self.images else tokens

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of its prompt are still to be measured."""
        return self.prompt_logprobs is not None and not self.num_generated


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position: that of the token there, and the likeliest tokens with theirs.

    rank: place of the token among all by likelihood, from 1; 0 where it is not measured.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class SampledToken(NamedTuple):
    """A generated token of one sequence. cached_tokens: tokens of its prompt that came from the prefix cache.

    started: when the sequence got its slot, by time.monotonic(). prompt_logprobs: of the prompt's tokens from the
    second on, with the first token of a sequence that asked for them. vector: of a sequence in an encoder, which has no
    token; its values as little-endian float32.
    """

    sequence_id: int
    token: int
    cached_tokens: int = 0
    logprobs: Logprobs | None = None
    started: float = 0.0
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    vector: bytes = b""
