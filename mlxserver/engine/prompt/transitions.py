"""Transitions: which message a chat template takes behind which, found by trying.

Rule 1: a message is taken where the template renders it and all that stands round it, in order.
Rule 2: what every template takes is not tried: a user first, user and assistant in turn, results behind their calls.
Rule 3: the table depends on the template alone, never on a conversation: what was rendered stays when messages are
        added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mlxserver.engine.conversation import Message, Text, Tool, ToolCall, ToolResult
from mlxserver.engine.requests import ChatPrompt

# "note": a system message that is not at the beginning. "call": an assistant's message with calls. "empty": one of
# an assistant with nothing in it. "orphan": a result of no open call.
Kind = Literal["start", "system", "note", "user", "assistant", "empty", "call", "tool", "orphan", "end"]

CANONICAL: dict[Kind, tuple[Kind, ...]] = {
    "start": ("user",),
    "system": ("user",),
    "note": ("user",),
    "user": ("assistant", "call", "end"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call", "end"),
}
_LEADS: dict[Kind, tuple[Kind, ...]] = {
    "start": (),
    "system": ("system",),
    "note": ("user", "assistant", "note"),
    "user": ("user",),
    "assistant": ("user", "assistant"),
    "call": ("user", "call"),
    "tool": ("user", "call", "tool"),
}
_TURN: tuple[Kind, ...] = ("assistant", "user")
_RESTS: dict[Kind, tuple[Kind, ...]] = {
    "system": ("user",),
    "note": ("user", *_TURN),
    "user": _TURN,
    "assistant": ("user", *_TURN),
    "empty": ("user", *_TURN),
    "call": ("tool", *_TURN),
    "tool": _TURN,
    "orphan": _TURN,
    "end": (),
}
_CALL_ID = "call_0123456789abcdef"
_TOOL = Tool("probe", "Probes.", {"type": "object", "properties": {"key": {"type": "string"}}})


class Table(Protocol):
    """What a template takes."""

    def takes(self, last: Kind, kind: Kind) -> bool:
        """Whether it takes the second kind behind the first."""

    @property
    def takes_text_beside_calls(self) -> bool:
        """Whether it shows the text of a message with calls."""


@dataclass(frozen=True, slots=True)
class StrictTable:
    """Table of a template that takes strict turns alone."""

    has_system: bool
    takes_text_beside_calls: bool

    def takes(self, last: Kind, kind: Kind) -> bool:
        """Whether the second kind stands behind the first in strict turns."""
        return kind in CANONICAL[last] or (self.has_system and (last, kind) == ("start", "system"))


class Transitions:
    """Table of one chat template, beside tools or without any.

    try_render(prompt, opens_answer): the text of a conversation, None where the template refuses it.
    """

    def __init__(self, try_render: Callable[[ChatPrompt, bool], str | None], *, has_tools: bool) -> None:
        self._try_render = try_render
        self._tools = (_TOOL,) if has_tools else ()
        self._known: dict[tuple[Kind, Kind], bool] = {}

    def takes(self, last: Kind, kind: Kind) -> bool:
        """Whether the template takes the second kind behind the first."""
        if kind in CANONICAL[last]:
            return True
        if (last, kind) not in self._known:
            kinds = [*_LEADS[last], *(() if kind == "end" else (kind,)), *_RESTS[kind]]
            messages = [_message(each, index) for index, each in enumerate(kinds)]
            self._known[last, kind] = self._shows(messages, is_end=kind == "end")
        return self._known[last, kind]

    @functools.cached_property
    def takes_text_beside_calls(self) -> bool:
        """Whether the template shows the text of a message with calls."""
        call = Message("assistant", (Text(_word(1)), ToolCall(_CALL_ID, "probe", {"key": "value"})))
        return self._shows([_message("user", 0), call, _message("tool", 2)])

    @functools.cached_property
    def takes_several_calls(self) -> bool:
        """Whether the template shows all calls of one message."""
        calls = tuple(ToolCall(f"{_CALL_ID}{n}", "probe", {"key": _word(n)}) for n in (1, 2))
        results = [Message("tool", (ToolResult(f"{_CALL_ID}{n}", _word(n + 2), "probe"),)) for n in (1, 2)]
        return self._shows([_message("user", 0), Message("assistant", calls), *results])

    @functools.cached_property
    def takes_developer(self) -> bool:
        """Whether the template shows the developer's messages as such, in any place."""
        developer = Message("developer", (Text(_word(1)),))
        rest = [_message(kind, index + 2) for index, kind in enumerate(("user", *_TURN))]
        return all(self._shows([*lead, developer, *rest]) for lead in ((), [_message("system", 0)], rest[:2]))

    def _shows(self, messages: Sequence[Message], *, is_end: bool = False) -> bool:
        """Whether all the words are rendered, in order; and, behind an unusual end, the beginning of the answer."""
        prompt = ChatPrompt(tuple(messages), self._tools)
        text = self._try_render(prompt, True)
        if text is None or not _has_in_order(text, _words(messages)):
            return False
        return not is_end or text != self._try_render(prompt, False)


def kind_of(message: Message, *, is_first: bool) -> Kind:
    """The kind of a message. is_first: nothing but system messages stands before it."""
    match message.role:
        case "system" | "developer":
            return "system" if is_first else "note"
        case "assistant":
            return "call" if message.calls else "assistant" if message.parts else "empty"
        case "user":
            return "user"
        case _:
            return "tool"


def _words(messages: Iterable[Message]) -> Iterator[str]:
    for message in messages:
        if message.text:
            yield message.text
        for call in message.calls:
            yield call.name
            yield str(call.arguments["key"])


def _word(index: int) -> str:
    return f"probe{index}word"


def _message(kind: Kind, index: int) -> Message:
    word = _word(index)
    match kind:
        case "call":
            return Message("assistant", (ToolCall(_CALL_ID, "probe", {"key": word}),))
        case "tool":
            return Message("tool", (ToolResult(_CALL_ID, word, "probe"),))
        case "orphan":
            return Message("tool", (ToolResult("call_of_another", word),))
        case "assistant":
            return Message("assistant", (Text(word),))
        case "empty":
            return Message("assistant", ())
        case "user":
            return Message("user", (Text(word),))
        case _:
            return Message("system", (Text(word),))


def _has_in_order(text: str, words: Iterable[str]) -> bool:
    position = 0
    return all((position := text.find(word, position)) >= 0 for word in words)
