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
class SamplingOptions:
    """What a request says of its sampling; None leaves it to the model's defaults, then to Sampling's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """OpenAI messages, each with a string content (or None beside tool calls), to be set in the model's template.

    continues_answer: the last message is the assistant's, and the answer goes on from its text.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continues_answer: bool = False


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to go on from as it is, without a chat template; special tokens in it count."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to go on from."""

    tokens: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """The answer is JSON. `schema` is a JSON schema; None allows any object."""

    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which of the prompt's tools may be called. "function" forces the one of that name; parallel: several calls."""

    mode: Literal["none", "auto", "required", "function"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """A prompt as the model reads it. opens_thinking: it ends inside the reasoning, of which only the end will come."""

    tokens: tuple[int, ...]
    text: str
    opens_thinking: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to one model.

    max_tokens None means: up to the end of the context. n answers are made from one prompt. top_logprobs None asks for
    no log-probabilities, 0 for the chosen token's alone. thinking_budget: most tokens of reasoning before it is closed.
    formatted: the prompt in the model's words, once it is known.
    """

    prompt: Prompt
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    top_logprobs: int | None = None
    format: JsonFormat | None = None
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    thinking_budget: int | None = None
    formatted: FormattedPrompt | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has formatted the prompt and will answer. No HTTP header leaves before this."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability under the model (before temperature and filters), and the likeliest ones."""

    text: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text of one choice, on its channel. Tags and stop strings are never part of it.

    logprobs: those of the tokens that brought the text, where the request asked for them.
    """

    text: str
    channel: Channel = "content"
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. `call` counts the calls of one choice; the first piece of each has id and name."""

    call: int
    arguments: str
    id: str | None = None
    name: str | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """One choice has ended."""

    reason: FinishReason
    index: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a generation's time went, in seconds: until a place was free, until the first token, from there on."""

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


Event = Accepted | Delta | ToolCallDelta | Finish | Usage


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Asks for the token ids of a prompt: answered with a tuple of ints."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Asks for the text of token ids: answered with a string."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ApplyTemplate:
    """Asks for the text that the chat template makes of messages: answered with a string."""

    prompt: ChatPrompt


Question = Tokenize | Detokenize | ApplyTemplate


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it is loaded. Context in tokens, weights in bytes as they are held.

    capabilities: of "chat", "completion", "tools", "json_schema", "logprobs" and "thinking".
    """

    type: str
    context_length: int
    weight_bytes: int
    capabilities: frozenset[str] = frozenset()


class Constraint(Protocol):
    """What a row may say next, decided from what it has said. Runs on the engine thread, between two tokens."""

    def allowed(self) -> bytes | None:
        """A bit mask over the vocabulary, the lowest bit of each byte first, as long as those of all other rows; None
        allows every token.
        """

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


@dataclass(frozen=True, slots=True)
class Row:
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
class RowToken:
    """One generated token of one row. cached_tokens is how much of its prompt the prefix cache had.

    started: when the row got its place, by time.monotonic().
    """

    row_id: int
    token: int
    cached_tokens: int = 0
    logprobs: Logprobs | None = None
    started: float = 0.0
