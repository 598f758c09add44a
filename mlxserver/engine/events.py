"""Events that an engine emits for a request. Plain frozen data, safe to share between threads.

Rule: a generation is Accepted, then any number of Deltas, one Finish per choice, and Usage at the very end; or, at any
      point, one EngineError and nothing after it. PromptLogprobs, where asked for, come before all else of a choice.
      Each choice of a request for embeddings is one Embedding and its Finish; of one for scores, a Relevance and its
      Finish.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls"]

Channel = Literal["content", "reasoning"]

MAX_CHUNKS = 1024  # of one prompt that are remembered


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request was admitted to the engine. HTTP headers go out only after this event."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model, before temperature and filters, with the likeliest tokens."""

    text: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptToken:
    """Token of a prompt. logprob: None for the first, which follows nothing; rank: by likelihood, from 1."""

    id: int
    text: str
    bytes: bytes
    logprob: float | None = None
    rank: int = 0
    top: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of all tokens of the prompt, for one choice."""

    tokens: tuple[PromptToken, ...]
    index: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of one choice, on its channel, without tags and stop strings.

    logprobs: of the tokens that the text comes from, where the request asked for them.
    """

    text: str
    channel: Channel = "content"
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a tool call. `call` counts the calls of one choice; the first delta of each call has id and name."""

    call: int
    arguments: str
    id: str | None = None
    name: str | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """Vector of one text: its values as little-endian float32. index: of the text in its request."""

    vector: bytes
    index: int = 0


@dataclass(frozen=True, slots=True)
class Relevance:
    """How well one document answers the query, from 0 to 1. index: of the document in its request."""

    score: float
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """End of one choice. stop: the stop string that ended it, None where none did."""

    reason: FinishReason
    index: int = 0
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a generation's parts, in seconds: until a slot was free, until the first token, from there on."""

    queue: float
    prompt: float
    generation: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole generation; the last event of it."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    timings: Timings = field(default_factory=lambda: Timings(0.0, 0.0, 0.0), compare=False)


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """A generation that waits for a slot. position: its place among those that do, from 1; 0: not counted yet."""

    position: int = 0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far the prefill of a prompt is, in tokens."""

    done: int
    total: int


@dataclass(slots=True, eq=False)
class PromptProgress:
    """How far the prompt of one generation is. The engine thread writes it, other threads may read it at any time.

    state: None once the prompt is processed, and where it is not known. chunks: when each state of the prefill was
    reached, by time.monotonic(), and the tokens that were done.
    """

    state: QueuePosition | PrefillProgress | None = QueuePosition()
    chunks: list[tuple[float, int]] = field(default_factory=list)

    def move(self, state: QueuePosition | PrefillProgress | None) -> None:
        """Set the state."""
        self.state = state
        if isinstance(state, PrefillProgress) and len(self.chunks) < MAX_CHUNKS:
            self.chunks.append((time.monotonic(), state.done))


Event = Accepted | PromptLogprobs | Delta | ToolCallDelta | Embedding | Relevance | Finish | Usage
