"""Encoders of OpenAI's answers: chunks of streams and whole answers, of chats and of bare completions.

Rule 1: what all chunks of a stream share is encoded once; a delta costs one small join.
Rule 2: the chunks of a choice are its start, its deltas and its finish, in this order; usage comes once, at the end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import orjson

from mlxserver.api import sse
from mlxserver.api.dialect import Failure, WaitProgress
from mlxserver.api.model_status import Progress
from mlxserver.api.openai.errors import envelope
from mlxserver.api.openai.generation import GeneratingRequest
from mlxserver.api.openai.logprobs import chat_logprobs, echo_logprobs, joined, prompt_logprobs, text_logprobs
from mlxserver.api.openai.tool_calls import tool_call_delta, tool_calls
from mlxserver.api.openai.usage import counts_object, timings_object, usage_object
from mlxserver.config.settings import ReasoningFormat
from mlxserver.engine.events import (
    Delta,
    Event,
    Finish,
    PrefillProgress,
    PromptLogprobs,
    PromptToken,
    QueuePosition,
    ToolCallDelta,
    Usage,
)

FINGERPRINT = f"mlx-{version('mlx')}-lm-{version('mlx-lm')}"
PROGRESS_NAMES = {Progress: "loading", QueuePosition: "queue", PrefillProgress: "prefill"}  # in comments
THINK_START, THINK_END = "<think>\n", "\n</think>\n\n"


class OpenAIEncoder(ABC):
    """What both encoders share. `objects`: the type of a whole answer and that of a chunk.

    is_inline: reasoning is a part of the text.
    """

    content_type = "text/event-stream; charset=utf-8"

    def __init__(
        self, request: GeneratingRequest, id_prefix: str, objects: tuple[str, str], *, is_inline: bool
    ) -> None:
        self._head = {
            "id": f"{id_prefix}-{uuid4().hex}",
            "object": objects[0],
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": FINGERPRINT,
        }
        self._chunk_start = b"data: " + orjson.dumps(self._head | {"object": objects[1]})[:-1] + b',"choices":['
        self._chunk_end = b"]}\n\n"
        self._prompt_logprobs = request.prompt_logprobs
        self._includes_usage, self._counts_deltas = request.include_usage, request.counts_pieces
        self._inline = InlineReasoning() if is_inline else None
        self._prompt_tokens = self._num_deltas = 0

    def start(self, prompt_tokens: int) -> bytes:
        """First chunk of each choice."""
        self._prompt_tokens = prompt_tokens
        if self._counts_deltas:
            self._update_usage()
        return self._first_chunks()

    def event(self, event: Event, choice: int) -> bytes:
        """Chunk of an event; none of one that the API does not show."""
        if self._counts_deltas:
            self._num_deltas += isinstance(event, Delta | ToolCallDelta)
            self._update_usage()
        if self._inline is None:
            return self._chunk(event, choice)
        return b"".join([self._chunk(part, choice) for part in self._inline.feed(event, choice)])

    def end(self, usage: Usage) -> bytes:
        """Chunk of token counts without choices, where it was asked for, and [DONE]."""
        if not self._includes_usage:
            return sse.DONE
        counts = (orjson.dumps(usage_object(usage)), orjson.dumps(timings_object(usage)))
        return b'%b],"usage":%b,"timings":%b}\n\n%b' % (self._chunk_start, *counts, sse.DONE)

    def failed(self, failure: Failure) -> bytes:
        """Error envelope as the last event, without [DONE]."""
        return sse.encode(envelope(failure))

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """Comment, which readers skip; with the progress as JSON."""
        if progress is None:
            return sse.comment("keep-alive")
        return sse.comment(f"{PROGRESS_NAMES[type(progress)]} {orjson.dumps(progress).decode()}")

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """Whole answer."""
        answers = [self._choice(self._inlined(events, index), index) for index, events in enumerate(choices)]
        counts = {"usage": usage_object(usage), "timings": timings_object(usage)}
        return orjson.dumps({**self._head, "choices": answers, **counts, **self._of_prompt(choices)})

    def _of_prompt(self, choices: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """What a whole answer has beside its choices, about the prompt."""
        return {}

    def _scores(self, events: Sequence[Event]) -> dict[str, Any]:
        """The prompt's log-probabilities, where they were asked for."""
        if self._prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(scored_prompt(events), self._prompt_logprobs)}

    @abstractmethod
    def _first_chunks(self) -> bytes: ...

    @abstractmethod
    def _chunk(self, event: Event, choice: int) -> bytes: ...

    @abstractmethod
    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]: ...

    def _inlined(self, events: Sequence[Event], index: int) -> Sequence[Event]:
        if self._inline is None:
            return events
        return [part for event in events for part in self._inline.feed(event, index)]

    def _update_usage(self) -> None:
        """Put token counts into every chunk from here on; each delta counts as a token."""
        counts = orjson.dumps(counts_object(self._prompt_tokens, self._num_deltas))
        self._chunk_end = b'],"usage":%b}\n\n' % counts


class ChatEncoder(OpenAIEncoder):
    """Encoder of chat completions. reasoning_format: the field that reasoning has, or "inline"."""

    def __init__(
        self, request: GeneratingRequest, reasoning_format: ReasoningFormat, *, has_logprobs: bool = False
    ) -> None:
        objects = ("chat.completion", "chat.completion.chunk")
        super().__init__(request, "chatcmpl", objects, is_inline=reasoning_format == "inline")
        self._num_choices, self._has_logprobs = request.n, has_logprobs
        self._reasoning_field = reasoning_format
        self._reasoning_start = b'"%b":' % reasoning_format.encode()

    def _first_chunks(self) -> bytes:
        return b"".join(self._delta(b'"role":"assistant"', choice) for choice in range(self._num_choices))

    def _chunk(self, event: Event, choice: int) -> bytes:
        match event:
            case Delta(text, "content") if not self._has_logprobs:  # first, as most are
                return self._delta(b'"content":' + orjson.dumps(text), choice)
            case Delta(text, "reasoning"):
                return self._delta(self._reasoning_start + orjson.dumps(text), choice)
            case Delta(text, logprobs=tokens):
                logprobs = b',"logprobs":' + orjson.dumps(chat_logprobs(tokens))
                return self._delta(b'"content":' + orjson.dumps(text), choice, logprobs)
            case ToolCallDelta():
                return self._delta(b'"tool_calls":' + orjson.dumps([tool_call_delta(event)]), choice)
            case Finish(reason):
                return self._delta(b"", choice, reason=orjson.dumps(reason))
        return b""

    def _delta(self, member: bytes, choice: int, logprobs: bytes = b"", *, reason: bytes = b"null") -> bytes:
        members = (self._chunk_start, choice, member, logprobs, reason, self._chunk_end)
        return b'%b{"index":%d,"delta":{%b}%b,"finish_reason":%b}%b' % members

    def _of_prompt(self, choices: Sequence[Sequence[Event]]) -> dict[str, Any]:
        return self._scores([event for events in choices[:1] for event in events])

    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]:
        content, reasoning, calls = text_of(events), text_of(events, "reasoning"), tool_calls(events)
        message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
        message["refusal"] = None
        if reasoning:
            message[self._reasoning_field] = reasoning
        if calls:
            message["tool_calls"] = calls
        deltas = [event for event in events if isinstance(event, Delta) and event.channel == "content"]
        tokens = [token for delta in deltas for token in delta.logprobs]
        logprobs = chat_logprobs(tokens) if self._has_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(events)}


class CompletionEncoder(OpenAIEncoder):
    """Encoder of bare completions. set_echo() gives prompts that their choices begin with.

    logprobs: how many of the likeliest tokens each token has beside it, None for no log-probabilities. Those of an
    echoed prompt come with its text.
    """

    def __init__(self, request: GeneratingRequest, *, logprobs: int | None = None) -> None:
        super().__init__(request, "cmpl", ("text_completion", "text_completion"), is_inline=True)
        self._choices_per_prompt, self._logprobs = request.n, logprobs
        self._echoes: dict[int, str] = {}
        self._offsets: defaultdict[int, int] = defaultdict(int)  # characters sent, by choice

    def set_echo(self, prompt: int, text: str) -> None:
        """Begin each choice of the prompt of this number with its text."""
        first = prompt * self._choices_per_prompt
        self._echoes |= dict.fromkeys(range(first, first + self._choices_per_prompt), text)

    def _first_chunks(self) -> bytes:
        if self._logprobs is not None:  # an echo waits for the log-probabilities
            return b""
        return b"".join(self._text(text, choice) for choice, text in self._echoes.items())

    def _chunk(self, event: Event, choice: int) -> bytes:
        match event:
            case PromptLogprobs(scored):
                text = self._echoes[choice]
                self._offsets[choice] = len(text)
                return self._text(text, choice, orjson.dumps(echo_logprobs(scored, text, self._logprobs or 0)))
            case Delta(text) if self._logprobs is None:
                return self._text(text, choice)
            case Delta(text, logprobs=tokens):
                logprobs = text_logprobs(tokens, self._offsets[choice])
                self._offsets[choice] += len(text)
                return self._text(text, choice, orjson.dumps(logprobs))
            case Finish(reason):
                return self._text("", choice, reason=orjson.dumps(reason))
        return b""

    def _text(self, text: str, choice: int, logprobs: bytes = b"null", *, reason: bytes = b"null") -> bytes:
        members = (self._chunk_start, choice, orjson.dumps(text), logprobs, reason, self._chunk_end)
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % members

    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]:
        tokens = [token for event in events if isinstance(event, Delta) for token in event.logprobs]
        echo = self._echoes.get(index, "")
        logprobs = None
        if self._logprobs is not None:
            logprobs = text_logprobs(tokens, len(echo))
            if index in self._echoes:
                logprobs = joined(echo_logprobs(scored_prompt(events), echo, self._logprobs), logprobs)
        return {
            "text": echo + text_of(events),
            "index": index,
            "logprobs": logprobs,
            "finish_reason": finish_reason(events),
            **self._scores(events),
        }


class InlineReasoning:
    """Reasoning as content between tags, choice by choice. Reasoning that was cut short stays open."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def feed(self, event: Event, choice: int) -> Iterator[Event]:
        """The event with its reasoning in the content."""
        match event:
            case Delta(text, "reasoning"):
                start = "" if choice in self._open else THINK_START
                self._open.add(choice)
                yield replace(event, text=start + text, channel="content")
            case Delta() | ToolCallDelta() if choice in self._open:
                self._open.discard(choice)
                yield Delta(THINK_END)
                yield event
            case _:
                yield event


def scored_prompt(events: Sequence[Event]) -> tuple[PromptToken, ...]:
    """The tokens of a choice's prompt, which was scored."""
    return next(event.tokens for event in events if isinstance(event, PromptLogprobs))


def text_of(events: Sequence[Event], channel: str = "content") -> str:
    """All text of a channel."""
    return "".join(event.text for event in events if isinstance(event, Delta) and event.channel == channel)


def finish_reason(events: Sequence[Event]) -> str:
    """How a choice ended."""
    return next(event.reason for event in events if isinstance(event, Finish))
