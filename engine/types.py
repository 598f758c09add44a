"""What crosses the border of an engine: requests in, events out. Plain frozen data, safe to share between threads.

Rule 1: nothing here imports MLX or knows HTTP.
Rule 2: a generation is told as Accepted, then any number of Deltas, one Finish a choice, and Usage at the very end;
        or, at any point, as one EngineError and nothing after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "tool_calls"]
Channel = Literal["content", "reasoning"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy. Filters apply to the temperature-scaled distribution: top_k (0: off), top_p (1: off),
    min_p (0: off). frequency_penalty and presence_penalty count generated tokens; repetition_penalty (1: off)
    counts the prompt's too. logit_bias maps token ids to an addend. A seed makes the draw reproducible.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """OpenAI messages, each with a string content (or None beside tool calls), to be set in the model's template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to one model. max_tokens None means: up to the end of the context."""

    prompt: ChatPrompt
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has formatted the prompt and will answer. No HTTP header leaves before this."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text of one choice, on its channel. Tags and stop strings are never part of it."""

    text: str
    channel: Channel = "content"
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """One choice has ended."""

    reason: FinishReason
    index: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole generation; the last event of it."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0


Event = Accepted | Delta | Finish | Usage


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it is loaded. Context in tokens, weights in bytes as they are held."""

    type: str
    context_length: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence for the batch: the prompt's token ids and how to go on from there."""

    id: int
    tokens: tuple[int, ...]
    sampling: Sampling
    max_tokens: int


@dataclass(frozen=True, slots=True)
class RowToken:
    """One generated token of one row. cached_tokens is how much of its prompt the prefix cache had."""

    row_id: int
    token: int
    cached_tokens: int = 0


class Batch(Protocol):
    """Rows decoded together. The seam at which tests put a scripted batch instead of a model.

    All calls are made on the engine thread.
    """

    def insert(self, row: Row) -> None:
        """Queue a row; it joins at one of the next steps."""

    def remove(self, row_ids: Sequence[int]) -> None:
        """Forget rows, wherever they are. Unknown ids are ignored."""

    def decode(self) -> list[RowToken]:
        """Advance every decoding row by one token; empty while there is none."""

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts, sized so that running streams go on."""

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""

    def close(self) -> None:
        """Free what the batch holds. The batch is not used afterwards."""
