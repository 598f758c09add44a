"""Turns: which messages a chat template can take, and in which order.

Rule 1: what loses nothing is put right: consecutive messages of one role are joined with a blank line, "developer" is
        "system", and a system message after the first turn is read at its place, as the user's.
Rule 2: what can't be put right is refused, and the error names the message as the client numbered it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mlxserver.config.errors import abbreviate
from mlxserver.engine.conversation import Message, Part, Role, Text, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import ChatPrompt

BLANK_LINE = Text("\n\n")
FOLLOWERS: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant", "user"),
}


def admit(prompt: ChatPrompt) -> list[Message]:
    """The messages as any template can read them, each result with the name of its function.

    Raises PromptRejected.
    """
    if not prompt.conversation:
        raise PromptRejected("There are no messages; expected at least one.", "prompt.conversation")
    for message in prompt.conversation:
        check_text(message.text, f"{message.origin}.content")
    if prompt.continues_answer:
        _check_continued(prompt.conversation[-1])
    return _name_results(prompt.conversation)


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


def _name_results(messages: Iterable[Message]) -> list[Message]:
    names: dict[str, str] = {}
    named = []
    for message in messages:
        if message.role == "assistant":
            names |= {call.id: call.name for call in message.calls}
        elif message.role == "tool":
            parts = tuple([_name_result(part, names) for part in message.parts])
            message = Message("tool", parts, message.origin, message.name)
        named.append(message)
    return named


def _name_result(part: Part, names: Mapping[str, str]) -> Part:
    if not isinstance(part, ToolResult) or part.name:
        return part
    return ToolResult(part.call_id, part.text, names.get(part.call_id))


def name_developer_system(messages: Iterable[Message]) -> list[Message]:
    """The messages with "developer", the newer name, replaced by "system"."""
    return [replace(message, role="system") if message.role == "developer" else message for message in messages]


def alternate(messages: Sequence[Message], *, continues_answer: bool = False) -> list[Message]:
    """Admitted messages as strict turns: at most one system message, then user and assistant alternately.

    After an assistant's tool calls come the tools' messages. The last turn is the user's or a tool's, with
    continues_answer the assistant's.
    Raises PromptRejected.
    """
    turns: list[Message] = []
    for message in name_developer_system(messages):
        if message.role == "system" and turns and turns[-1].role != "system":
            message = replace(message, role="user")
        if turns and _is_joined(turns[-1], message):
            turns[-1] = join(turns[-1], message)
        else:
            if message.role not in (expected := _followers(turns)):
                raise _misplaced(message.role, message.origin, expected)
            turns.append(message)
    if not continues_answer and "assistant" not in _followers(turns):
        raise _misplaced(turns[-1].role, messages[-1].origin, ("user", "tool"))
    return turns


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with a system message as the beginning of the user's that follows it."""
    if [message.role for message in messages[:2]] != ["system", "user"]:
        return list(messages)
    return [join(messages[0], messages[1]), *messages[2:]]


def join(first: Message, second: Message) -> Message:
    """Two messages as one of the second's role, a blank line between their texts."""
    between = (BLANK_LINE,) if first.text and second.text else ()
    return Message(second.role, (*first.parts, *between, *second.parts), first.origin, second.name or first.name)


def _is_joined(last: Message, message: Message) -> bool:
    return last.role == message.role != "tool" and not last.calls


def _misplaced(role: Role, origin: str, expected: Sequence[Role]) -> PromptRejected:
    param = f"{origin}.role"
    return PromptRejected(
        f"{param} is {role!r}; expected {' or '.join(expected)}: "
        "user and assistant take turns, the user begins, and the last message is the one to answer.",
        param,
    )


def _followers(turns: Sequence[Message]) -> tuple[Role, ...]:
    """The roles that may come next."""
    if not turns:
        return FOLLOWERS[None]
    return ("tool",) if turns[-1].calls else FOLLOWERS[turns[-1].role]
