"""Boundaries of a rendered conversation: how many of its first tokens another prompt is likely to share.

They are where the system message and the tools end, where the last message begins, and where the history ends: the
next turn may come without the reasoning that follows there. A boundary that is a little off costs some tokens that are
computed again, and never a wrong text (kv_cache/checkpoints.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxserver.engine.conversation import Message, Text, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.chat_template import ChatTemplate
from mlxserver.engine.requests import ChatPrompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_PROBE = Text("\u2042")  # what no message begins with
_SYSTEM_TEXTS_KEPT = 8


class Boundaries:
    """Finds the boundaries of one model's prompts."""

    def __init__(self, template: ChatTemplate, tokenizer: TokenizerWrapper) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._head = functools.lru_cache(maxsize=_SYSTEM_TEXTS_KEPT)(self._encode)

    def find(self, prompt: ChatPrompt, text: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """The boundaries of a prompt, in order. text, tokens: the prompt, rendered."""
        conversation = prompt.conversation
        system = next((n for n, message in enumerate(conversation) if message.role not in ("system", "developer")), 0)
        last = max((n + 1 for n, message in enumerate(conversation) if message.role == "assistant"), default=system)
        found = {self._behind_head(text, tokens, self._common(text, prompt, (*conversation[:system], _user())))}
        if prompt.continues_answer:
            last = len(conversation) - 1
        elif ahead := self._common(text, prompt, conversation, opens_answer=False):
            found.add(self._before_tail(text, tokens, ahead))
        if system < last < len(conversation):
            changed = (*conversation[:last], _changed(conversation[last]), *conversation[last + 1 :])
            found.add(self._before_tail(text, tokens, self._common(text, prompt, changed)))
        return tuple(sorted(found - {0}))

    def _common(
        self, text: str, prompt: ChatPrompt, conversation: Sequence[Message], *, opens_answer: bool = True
    ) -> int:
        """Number of characters that the prompt has in common with another one; 0 if that can't be rendered."""
        other = replace(prompt, conversation=tuple(conversation), continues_answer=False)
        try:
            return _common_length(text, self._template.render(other, opens_answer=opens_answer))
        except PromptRejected:
            return 0

    def _behind_head(self, text: str, tokens: Sequence[int], characters: int) -> int:
        """Number of tokens that the first characters are."""
        return _common_length(self._head(text[:characters]), tuple(tokens))

    def _before_tail(self, text: str, tokens: Sequence[int], characters: int) -> int:
        """Number of tokens before those of the last characters."""
        if not characters:
            return 0
        tail = self._encode(text[characters:])
        is_exact = tuple(tokens[len(tokens) - len(tail) :]) == tail
        return max(0, len(tokens) - len(tail) - (not is_exact))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def _common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Number of first items that are equal: some slices are compared, and no single items."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _user() -> Message:
    return Message("user", (_PROBE,))


def _changed(message: Message) -> Message:
    """A message with other content."""
    parts = [part for part in message.parts if isinstance(part, ToolResult)]
    return replace(message, parts=tuple(replace(part, text=_PROBE.text) for part in parts) or (_PROBE,))
