"""What may stand in a conversation, and in which order.

Rule 1: what loses nothing is put right: consecutive messages of one role are joined with a blank line, "developer" is
        "system", and a system message after the first turn is read at its place, as the user's.
Rule 2: what can't be put right is refused, and the error names the message as the client numbered it.
Rule 3: the arguments of a tool call are an object here, as templates want them, and a tool's message has its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlxserver.config.errors import abbreviate
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import ChatPrompt

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def admit(prompt: ChatPrompt) -> list[Message]:
    """The messages as any template can read them: known roles only, and a text in every one. Raises PromptRejected."""
    if not prompt.messages:
        raise PromptRejected("There are no messages; expected at least one.")
    messages: list[Message] = []
    for index, message in enumerate(prompt.messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PromptRejected(
                f"messages[{index}].role is {role!r}; expected one of {', '.join(ROLES)}.", f"messages[{index}].role"
            )
        check_text(content, f"messages[{index}].content")
        messages.append({**message, "content": content or ""})
        if calls := message.get("tool_calls"):
            places = (f"messages[{index}].tool_calls[{n}].function" for n in range(len(calls)))
            messages[-1]["tool_calls"] = [_admit_call(*pair) for pair in zip(calls, places, strict=True)]
    _check_continued(prompt)
    return _name_results(messages)


def check_text(content: object, param: str) -> None:
    """Refuse what is neither text nor None. Raises PromptRejected."""
    if content is not None and not isinstance(content, str):
        raise PromptRejected(f"{param} is a {type(content).__name__}; expected text.", param)
    try:
        (content or "").encode()
    except UnicodeEncodeError as error:
        raise PromptRejected(f"{param} has a lone surrogate at {error.start}; expected Unicode text.", param) from None


def _admit_call(call: Message, param: str) -> Message:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PromptRejected(f"{param} is {abbreviate(function)}; expected an object with a name and arguments.", param)
    arguments = _read_arguments(function.get("arguments"), f"{param}.arguments")
    called = {"name": function["name"], "arguments": arguments}
    return {"type": "function", **call, "id": str(call.get("id") or ""), "function": called}


def _read_arguments(arguments: object, param: str) -> dict[str, Any]:
    """The object that the text stands for; no text stands for an empty one."""
    read = arguments or {}
    if isinstance(read, str):
        try:
            read = json.loads(read) if read.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptRejected(f"{param} is {abbreviate(arguments)}; expected JSON: {error}.", param) from None
    if not isinstance(read, dict):
        raise PromptRejected(f"{param} is {abbreviate(arguments)}; expected a JSON object.", param)
    return read


def _name_results(messages: Iterable[Message]) -> list[Message]:
    """The messages, with the name of the function that was called in each tool's."""
    names: dict[object, str] = {}
    named = []
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        is_nameless = message["role"] == "tool" and not message.get("name") and message.get("tool_call_id") in names
        named.append({**message, "name": names[message["tool_call_id"]]} if is_nameless else message)
    return named


def _check_continued(prompt: ChatPrompt) -> None:
    if not prompt.continues_answer:
        return
    last, place = prompt.messages[-1], f"messages[{len(prompt.messages) - 1}]"
    if last["role"] != "assistant":
        param = f"{place}.role"
        raise PromptRejected(f"{param} is {last['role']!r}; expected 'assistant', whose answer is to go on.", param)
    if last.get("tool_calls") or not continued_field(last):
        param = f"{place}.content"
        raise PromptRejected(
            f"{param} is {abbreviate(last.get('content'))}; expected text for the answer to go on from.", param
        )


def continued_field(message: Mapping[str, Any]) -> str | None:
    """Which field of an assistant's message an answer goes on from: its text, or its reasoning while it has none."""
    return next((field for field in ("content", "reasoning_content") if message.get(field)), None)


def name_developer_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with "developer", the newer name, replaced by "system"."""
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def alternate(messages: Sequence[Message], *, continues_answer: bool = False) -> list[Message]:
    """Admitted messages as strict turns: at most one system message, then user and assistant alternately.

    After an assistant's tool calls come the tools' messages. The last turn is the user's or a tool's, with
    continues_answer the assistant's.
    Raises PromptRejected.
    """
    turns: list[Message] = []
    for index, message in enumerate(name_developer_system(messages)):
        if message["role"] == "system" and turns and turns[-1]["role"] != "system":
            message = {**message, "role": "user"}
        if turns and _is_joined(turns[-1], message):
            turns[-1] = join(turns[-1], message)
        else:
            if message["role"] not in (expected := _followers(turns)):
                raise _misplaced(message["role"], index, expected)
            turns.append(message)
    if not continues_answer and "assistant" not in _followers(turns):
        raise _misplaced(turns[-1]["role"], len(messages) - 1, ("user", "tool"))
    return turns


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with a system message as the beginning of the user's that follows it."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return list(messages)
    return [{**join(messages[0], messages[1]), "role": "user"}, *messages[2:]]


def join(last: Message, message: Message) -> Message:
    """Two messages as one, a blank line between their texts."""
    texts = (last["content"], message["content"])
    return {**last, **message, "content": "\n\n".join(text for text in texts if text)}


def _is_joined(last: Message, message: Message) -> bool:
    return last["role"] == message["role"] != "tool" and not last.get("tool_calls")


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
