"""Boundaries of a rendered conversation: how many of its first tokens another prompt is likely to share.

They are where the system message and the tools end, where the last message begins, and where the history ends: the
next turn may come without the reasoning that follows there. A boundary that is a little off costs some tokens that are
computed again, and never a wrong text (kv_cache/checkpoints.py).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
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
        self._heads = deque[tuple[ChatPrompt, str]](maxlen=_SYSTEM_TEXTS_KEPT)
        self._head = functools.lru_cache(maxsize=_SYSTEM_TEXTS_KEPT)(self._encode)

    def find(self, prompt: ChatPrompt, text: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """The boundaries of a prompt, in order. text, tokens: the prompt, rendered."""
        conversation = prompt.conversation
        system = next((n for n, message in enumerate(conversation) if message.role not in ("system", "developer")), 0)
        last = max((n + 1 for n, message in enumerate(conversation) if message.role == "assistant"), default=system)
        found = {self._behind_head(text, tokens, _common_length(text, self._head_text(prompt, system)))}
        if prompt.continues_answer:
            last = len(conversation) - 1
        elif ahead := self._ahead(text, prompt, last):
            found.add(self._before_tail(text, tokens, ahead))
        if system < last < len(conversation):
            found.add(self._before_tail(text, tokens, self._before_change(text, prompt, last)))
        return tuple(sorted(found - {0}))

    def _head_text(self, prompt: ChatPrompt, system: int) -> str:
        """The first messages with the tools, rendered before a question: as they were, if recent ones are the same."""
        head = replace(prompt, conversation=(*prompt.conversation[:system], _user()), continues_answer=False)
        known = next((kept for kept in self._heads if kept[0] == head), None)
        if known is None:
            self._heads.append(known := (head, self._render(head) or ""))
        return known[1]

    def _ahead(self, text: str, prompt: ChatPrompt, last: int) -> int:
        """Number of characters up to where the answer is opened; 0 if that is not found."""
        for shown in self._ends(prompt, last):
            opened = self._render(shown) if shown is not prompt else text
            if found := _place(text, opened, self._render(shown, opens_answer=False)):
                return found
        return 0

    def _before_change(self, text: str, prompt: ChatPrompt, last: int) -> int:
        """Number of characters up to the content of a message; 0 if that is not found."""
        for shown in self._ends(prompt, last):
            messages = shown.conversation
            at = len(messages) - (len(prompt.conversation) - last)
            conversation = (*messages[:at], _changed(messages[at]), *messages[at + 1 :])
            changed = replace(shown, conversation=conversation, continues_answer=False)
            if found := _place(text, self._render(shown) if shown is not prompt else text, self._render(changed)):
                return found
        return 0

    def _ends(self, prompt: ChatPrompt, last: int) -> Iterator[ChatPrompt]:
        """Prompts that end as this one does: one of its last messages alone, which is soon rendered, and itself."""
        end = prompt.conversation[last:]
        if end and end[0].role == "tool":
            end = (_user(), *prompt.conversation[last - 1 :])
        if end and len(end) < len(prompt.conversation) and not prompt.continues_answer:
            yield replace(prompt, conversation=end, tools=())
        yield prompt

    def _render(self, prompt: ChatPrompt, *, opens_answer: bool = True) -> str | None:
        """The text of a prompt; None if the template refuses it."""
        try:
            return self._template.render(prompt, opens_answer=opens_answer)
        except PromptRejected:
            return None

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


def _place(text: str, shown: str | None, changed: str | None) -> int:
    """Where `shown`, whose end is that of `text`, begins to differ from `changed`; 0 if it ends otherwise."""
    if shown is None or changed is None:
        return 0
    tail = shown[_common_length(shown, changed) :]
    return len(text) - len(tail) if text.endswith(tail) else 0


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
