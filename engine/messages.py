"""What may stand in a conversation, and in which order.

Rule 1: what loses nothing is put right: consecutive messages of one role are joined with a blank line, "developer" is
        "system", and a system message after the first turn is read at its place, as the user's.
Rule 2: what can't be put right is refused, and the error names the message as the client numbered it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import PromptRejected
from engine.types import ChatPrompt

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def admit(prompt: ChatPrompt, *, has_tools: bool) -> list[Message]:
    """The messages as any template can read them: known roles only, and a text in every one.

    Raises PromptRejected, also for tools where the model's template has no place for them.
    """
    if not prompt.messages:
        raise PromptRejected("There are no messages; expected at least one.")
    if prompt.tools and not has_tools:
        raise PromptRejected("The chat template of this model has no place for tools.", "tools")
    for index, message in enumerate(prompt.messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PromptRejected(
                f"messages[{index}].role is {role!r}; expected one of {', '.join(ROLES)}.", f"messages[{index}].role"
            )
        _check_text(content, f"messages[{index}].content")
        if not has_tools and (role == "tool" or message.get("tool_calls")):
            param = f"messages[{index}].{'role' if role == 'tool' else 'tool_calls'}"
            raise PromptRejected(f"{param}: the chat template of this model has no place for tools.", param)
    return [{**message, "content": message.get("content") or ""} for message in prompt.messages]


def _check_text(content: object, param: str) -> None:
    if content is not None and not isinstance(content, str):
        raise PromptRejected(f"{param} is a {type(content).__name__}; expected text.", param)
    try:
        (content or "").encode()
    except UnicodeEncodeError as error:
        raise PromptRejected(f"{param} has a lone surrogate at {error.start}; expected Unicode text.", param) from None


def name_developer_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with "developer", the newer name, replaced by "system"."""
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def alternate(messages: Sequence[Message], *, has_system: bool) -> list[Message]:
    """Admitted messages as strict turns: at most one system message, then user and assistant alternately.

    After an assistant's tool calls come the tools' messages. The last turn is the user's or a tool's. Without
    `has_system` the system message becomes the beginning of the first user message.
    Raises PromptRejected.
    """
    turns: list[Message] = []
    for index, message in enumerate(name_developer_system(messages)):
        if message["role"] == "system" and turns and turns[-1]["role"] != "system":
            message = {**message, "role": "user"}
        if turns and _is_joined(turns[-1], message):
            turns[-1] = _join(turns[-1], message)
        else:
            if message["role"] not in (expected := _followers(turns)):
                raise _misplaced(message["role"], index, expected)
            turns.append(message)
    if "assistant" not in _followers(turns):
        raise _misplaced(turns[-1]["role"], len(messages) - 1, ("user", "tool"))
    return turns if has_system else _fold_system(turns)


def _is_joined(last: Message, message: Message) -> bool:
    return last["role"] == message["role"] != "tool" and not last.get("tool_calls")


def _join(last: Message, message: Message) -> Message:
    texts = (last["content"], message["content"])
    return {**last, **message, "content": "\n\n".join(text for text in texts if text)}


def _misplaced(role: str, index: int, expected: Sequence[str]) -> PromptRejected:
    param = f"messages[{index}].role"
    return PromptRejected(
        f"{param} is {role!r}; expected {' or '.join(expected)}: "
        "user and assistant take turns, the user begins, and the last message is the one to answer.",
        param,
    )


def _followers(turns: Sequence[Message]) -> tuple[str, ...]:
    """The roles that may come next."""
    last = turns[-1] if turns else {"role": None}
    if last.get("tool_calls"):
        return ("tool",)
    return {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
        "tool": ("tool", "assistant", "user"),
    }[last["role"]]


def _fold_system(turns: list[Message]) -> list[Message]:
    if turns[0]["role"] != "system":
        return turns
    return [{**_join(turns[0], turns[1]), "role": "user"}, *turns[2:]]
