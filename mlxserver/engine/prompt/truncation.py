"""Truncation: a conversation without its oldest messages, so that it fits in the context.

Rule: system messages at the beginning stay, and so does the last message. A result leaves with its call.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

from mlxserver.engine.conversation import Message
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt

log = logging.getLogger("engine")

ROOM_SHARE = 4  # the answer gets room up to this part of the context


def most_tokens(context_length: int, max_tokens: int | None) -> int:
    """Most tokens of a truncated prompt: the answer gets its max_tokens, but no more than a part of the context."""
    return context_length - max(1, min(max_tokens or context_length, context_length // ROOM_SHARE))


def truncate(prompt: ChatPrompt, format: Callable[[ChatPrompt], FormattedPrompt], most: int) -> FormattedPrompt:
    """The prompt with as many messages as fit in so many tokens; with the fewest if that is too long as well."""
    formatted = format(prompt)
    if len(formatted.tokens) <= most:
        return formatted
    messages = prompt.conversation
    head = len(list(takewhile(lambda message: message.role in ("system", "developer"), messages)))
    starts = _starts(messages, head)
    tried: dict[int, FormattedPrompt] = {}

    def fits(start: int) -> bool:
        tried[start] = format(replace(prompt, conversation=(*messages[:head], *messages[start:])))
        return len(tried[start].tokens) <= most

    start = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)] if starts else head
    log.debug("%d messages are left out, so that the prompt fits in %d tokens", start - head, most)
    return tried.get(start, formatted)


def _starts(messages: Sequence[Message], head: int) -> list[int]:
    """Where a conversation may begin instead, behind its first messages."""
    return [n for n in range(head + 1, len(messages)) if messages[n].role != "tool"]
