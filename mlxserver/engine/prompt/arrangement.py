"""Arrangement: the messages of a conversation in turns that a chat template takes, with the fewest changes.

Rule 1: a message is changed only where the template does not take it behind the one before (prompt/transitions.py).
Rule 2: nothing is lost: messages are joined with a blank line, a system message is read at its place as the user's, and
        so is a result without a call. What is missing between two messages is put there in plain words.
Rule 3: what was arranged stays as it is when messages are added, but for the last message, which they may be joined to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mlxserver.engine.conversation import Message, Text, ToolCall, ToolResult
from mlxserver.engine.prompt.tool_text import write_result
from mlxserver.engine.prompt.transitions import Kind, Table, kind_of
from mlxserver.engine.prompt.turns import join

log = logging.getLogger("engine")

BEGIN = "Begin."
CONTINUE = "Continue."
SEEN = "OK."
NO_RESULT = "This call has no result."


def arrange(messages: Iterable[Message], table: Table, *, continues_answer: bool = False) -> list[Message]:
    """The messages in turns that a template with this table takes, up to the one to answer or to go on with."""
    arrangement = _Arrangement(table)
    for message in messages:
        arrangement.add(message)
    if not continues_answer:
        arrangement.close()
    return arrangement.turns


def split_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with one call in each, its results behind it."""
    split: list[Message] = []
    waiting = list(messages)
    while waiting:
        message = waiting.pop(0)
        if len(message.calls) < 2:
            split.append(message)
            continue
        results: list[Message] = []
        while waiting and waiting[0].role == "tool":
            results.append(waiting.pop(0))
        log.debug("%s: each of its calls is a message of its own", message.origin)
        split.extend(_one_by_one(message, results))
    return split


def _one_by_one(message: Message, results: list[Message]) -> Iterator[Message]:
    others = tuple(part for part in message.parts if not isinstance(part, ToolCall))
    for call in message.calls:
        yield replace(message, parts=(*others, call))
        others = ()
        yield from (mine for mine in results if mine.result and mine.result.call_id == call.id)
        results = [other for other in results if not other.result or other.result.call_id != call.id]
    yield from results


def begin(messages: Sequence[Message]) -> list[Message]:
    """The messages with a user's, which some templates ask for, behind the first system messages if there is none."""
    if any(message.role == "user" for message in messages):
        return list(messages)
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    return [*messages[:first], Message("user", (Text(BEGIN),), messages[0].origin), *messages[first:]]


class _Arrangement:
    """Turns that messages are added to. _open: the calls of the last answer that have no result yet, by their ids."""

    def __init__(self, table: Table) -> None:
        self.turns: list[Message] = []
        self._table = table
        self._takes = table.takes
        self._open: dict[str, ToolCall] = {}
        self._ends_in_system_text = False

    @property
    def _last(self) -> Kind:
        if not self.turns:
            return "start"
        kind = kind_of(self.turns[-1], is_first=all(turn.role in ("system", "developer") for turn in self.turns))
        return "assistant" if kind == "empty" else kind

    @property
    def _has_answer(self) -> bool:
        return any(turn.role == "assistant" for turn in self.turns)

    def add(self, message: Message) -> None:
        """Add a message behind the others."""
        match message.role:
            case "tool":
                self._add_result(message)
            case "assistant":
                self._add_answer(message)
            case "user":
                self._add_user(message)
            case _:
                self._add_system(message)

    def close(self) -> None:
        """Make the last turn one that can be answered."""
        self._answer_calls_before("end")
        last = self._last
        if not self._takes(last, "end"):
            self._insert("user", BEGIN if last in ("start", "system") else CONTINUE)

    def _add_system(self, message: Message) -> None:
        kind = kind_of(message, is_first=self._last in ("start", "system"))
        if self._is_behind_calls_that_must_be_answered(kind):
            self._answer_calls_before(kind)
        if self._takes(self._last, kind):
            self._append(message)
        elif self._last == kind:
            self._join(message)
        else:
            log.debug("%s: the system message is read as the user's", message.origin)
            self._add_user(replace(message, role="user"), is_system_text=True)

    def _add_user(self, message: Message, *, is_system_text: bool = False) -> None:
        is_joined = is_system_text or self._ends_in_system_text or not self._takes("user", "user")
        if self._last == "user" and is_joined:
            self._join(message)
        else:
            self._answer_calls_before("user")
            if not self._takes(self._last, "user"):
                self._insert("assistant", SEEN)
            self._append(message)
        self._ends_in_system_text = is_system_text

    def _add_answer(self, message: Message) -> None:
        if message.calls and message.text and not self._table.takes_text_beside_calls:
            log.debug("%s: the text before its calls is a message of its own", message.origin)
            self._add_answer(replace(message, parts=(Text(message.text),)))
            message = replace(message, parts=tuple(part for part in message.parts if not isinstance(part, Text)))
        kind = kind_of(message, is_first=False)
        last = self._last
        if self._takes(last, kind):
            self._append(message)
        elif kind == "empty":
            log.debug("%s: the message is left out, there is nothing in it", message.origin)
        elif last in ("assistant", "call") and (kind == last or self._table.takes_text_beside_calls):
            self._join(message)
        else:
            self._answer_calls_before("user")
            self._insert("user", CONTINUE if self._has_answer else BEGIN)
            self._append(message)

    def _add_result(self, message: Message) -> None:
        is_open = message.result is not None and message.result.call_id in self._open
        if self._takes(self._last, "tool" if is_open else "orphan"):
            self._append(message)
        else:
            log.debug("%s: the result of no call is read as the user's text", message.origin)
            self._add_user(write_result(message))

    def _is_behind_calls_that_must_be_answered(self, kind: Kind) -> bool:
        return bool(self._open) and not self._takes("call", kind)

    def _answer_calls_before(self, kind: Kind) -> None:
        """Give a result to the calls without one, where a message of this kind is not taken behind a call."""
        if not self._is_behind_calls_that_must_be_answered(kind):
            return
        for call in list(self._open.values()):
            log.debug("%s: the call %r gets the result %r", self.turns[-1].origin, call.id, NO_RESULT)
            self._append(Message("tool", (ToolResult(call.id, NO_RESULT, call.name),), self.turns[-1].origin))

    def _insert(self, role: str, text: str) -> None:
        origin = self.turns[-1].origin if self.turns else "messages"
        log.debug("behind %s: the %s's %r is put between", origin, role, text)
        self._append(Message(role, (Text(text),), origin))  # type: ignore[arg-type]

    def _join(self, message: Message) -> None:
        log.debug("%s: joined to the %s message before", message.origin, message.role)
        self.turns[-1] = join(self.turns[-1], message)
        self._open |= {call.id: call for call in message.calls}

    def _append(self, message: Message) -> None:
        if message.result:
            self._open.pop(message.result.call_id, None)
        elif self._last != "call" or not message.calls:
            self._open = {}
        self.turns.append(message)
        self._open |= {call.id: call for call in message.calls}
        self._ends_in_system_text = False
