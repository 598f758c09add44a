"""Turns: what any chat template can be given of a conversation.

Rule 1: a history is not judged: who wrote what behind whom is the template's matter (prompt/arrangement.py).
Rule 2: what is no conversation is refused: no messages, text that is no Unicode, no answer where one is to go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from mlxserver.config.errors import abbreviate
from mlxserver.engine.conversation import Message, Part, Text, ToolCall
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.volatile import without_volatile_lines
from mlxserver.engine.requests import ChatPrompt

BLANK_LINE = Text("\n\n")


def admit(prompt: ChatPrompt) -> list[Message]:
    """The messages, each call with an id, each result with its call's id and the name of the function where it has one.

    What changes from request to request is left out of them. Raises PromptRejected.
    """
    if not prompt.conversation:
        raise PromptRejected("There are no messages; expected at least one.", "prompt.conversation")
    for message in prompt.conversation:
        check_text(message.text, f"{message.origin}.content")
    if prompt.continues_answer:
        _check_continued(prompt.conversation[-1])
    stable = list(without_volatile_lines(prompt.conversation))
    return _pair(stable or prompt.conversation)


def check_text(text: str, param: str) -> None:
    """Refuse what is no Unicode text. Raises PromptRejected."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptRejected(f"{param} has a lone surrogate at {error.start}; expected Unicode text.", param) from None


def _check_continued(last: Message) -> None:
    """Refuse to go on with what is no answer, or has no text."""
    if last.role != "assistant":
        param = f"{last.origin}.role"
        raise PromptRejected(f"{param} is {last.role!r}; expected 'assistant', whose answer is to go on.", param)
    if last.calls or not (last.text or last.reasoning):
        param = f"{last.origin}.content"
        raise PromptRejected(
            f"{param} is {abbreviate(last.text)}; expected text for the answer to go on from, and no calls.", param
        )


def _pair(messages: Iterable[Message]) -> list[Message]:
    """The messages with the ids and names that are missing. A result without an id answers the first open call."""
    names: dict[str, str] = {}
    open_ids: list[str] = []
    paired = []
    for message in messages:
        if message.calls:
            first = len(names)
            parts = [_identify(part, f"call_{first + n}") for n, part in enumerate(message.parts)]
            message = replace(message, parts=tuple(parts))
            names |= {call.id: call.name for call in message.calls}
            open_ids += [call.id for call in message.calls]
        elif result := message.result:
            call_id = result.call_id or (open_ids[0] if open_ids else "")
            open_ids = [open_id for open_id in open_ids if open_id != call_id]
            named = replace(result, call_id=call_id, name=result.name or names.get(call_id))
            message = replace(message, parts=(named,))
        elif message.role == "user":
            open_ids = []
        paired.append(message)
    return paired


def _identify(part: Part, call_id: str) -> Part:
    return replace(part, id=call_id) if isinstance(part, ToolCall) and not part.id else part


def name_developer_system(messages: Iterable[Message]) -> list[Message]:
    """The messages with "developer", the newer name, replaced by "system"."""
    return [replace(message, role="system") if message.role == "developer" else message for message in messages]


def join(first: Message, second: Message) -> Message:
    """Two messages as one of the second's role, a blank line between their texts."""
    between = (BLANK_LINE,) if first.text and second.text else ()
    return Message(second.role, (*first.parts, *between, *second.parts), first.origin, second.name or first.name)


def count_lost(messages: Iterable[Message], text: str, thinking_end: str) -> int:
    """How many texts and names of calls are not in a rendered text.

    Not counted is what a template may leave out of earlier turns: reasoning, also where it stands in an answer's text,
    and what was written before a call.
    """
    position = lost = 0
    for message in messages:
        for written in _written(message, thinking_end):
            if (index := text.find(written, position)) >= 0:
                position = index
            elif not (written in text or json.dumps(written, ensure_ascii=False)[1:-1] in text):
                lost += 1
    return lost


def _written(message: Message, thinking_end: str) -> list[str]:
    if message.calls:
        return [call.name for call in message.calls]
    text = message.text.rpartition(thinking_end)[2] if message.role == "assistant" else message.text
    return [text.strip()] if text.strip() else []
