"""Tools, their calls and results as plain text, for a chat template that has no place for them.

Rule 1: a call is written in the format in which the model's calls are read, in the prompt and in the history alike.
Rule 2: a result is the user's text, inside tags of its own, unless the template shows results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mlxserver.engine.conversation import Message, Reasoning, Text, Tool, ToolCall
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.tool_formats import PLAIN, ToolFormat
from mlxserver.engine.prompt.turns import join

DESCRIPTION = """\
You can call functions. Each line here describes one, its parameters as a JSON schema:
{tools}

To call a function, write its name and its arguments as JSON between these tags, and nothing behind them:
{call}
For several calls, write several such blocks. The results come back between <tool_response> and </tool_response>.
Call a function only where it helps; otherwise answer in plain words."""


def describe(messages: Sequence[Message], tools: Iterable[Tool], tool_format: ToolFormat = PLAIN) -> list[Message]:
    """The messages with the tools described at the end of their system message, which is put first if there is none."""
    lines = "\n".join(write_json(tool.function) for tool in tools)
    call = tool_format.write("function_name", {"argument": "value"})
    system = Message("system", (Text(DESCRIPTION.format(tools=lines, call=call)),))
    if messages and messages[0].role == "system":
        return [join(messages[0], system), *messages[1:]]
    return [system, *messages]


def write_plain(
    messages: Iterable[Message], tool_format: ToolFormat = PLAIN, *, keeps_results: bool = False
) -> list[Message]:
    """The messages with tool calls as text, and results too unless they are kept.

    A result is joined with the results or the user around it.
    """
    written: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message.role == "tool" and not keeps_results
        plain = write_result(message) if is_result else _write_calls(message, tool_format)
        if written and plain.role == "user" == written[-1].role and (is_result or was_result):
            written[-1] = join(written[-1], plain)
        else:
            written.append(plain)
        was_result = is_result
    return written


def write_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The messages with the reasoning before the calls since the last question at the beginning of their text.

    A template that drops the reasoning of earlier turns takes results that are the user's text for new questions.
    """
    questions = [index for index, message in enumerate(messages) if message.role == "user"]
    last = questions[-1] if questions else -1
    return [
        _with_reasoning_as_text(message) if index > last and message.calls and message.reasoning else message
        for index, message in enumerate(messages)
    ]


def _with_reasoning_as_text(message: Message) -> Message:
    others = [part for part in message.parts if not isinstance(part, Reasoning)]
    between = "\n\n" if message.text else ""
    return replace(message, parts=(Text(message.reasoning + between), *others))


def write_json(value: object) -> str:
    """A value of tools or their calls as JSON text. Raises PromptRejected."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise PromptRejected("The tools or their calls are nested too deeply to be written.", "tools") from None


def _write_calls(message: Message, tool_format: ToolFormat) -> Message:
    calls = message.calls
    if not calls:
        return message
    lines = [*filter(None, [message.text]), *(_write_call(call, tool_format) for call in calls)]
    others = [part for part in message.parts if not isinstance(part, Text | ToolCall)]
    return Message(message.role, (*others, Text("\n".join(lines))), message.origin, message.name)


def write_result(message: Message) -> Message:
    """A tool's result as the user's text, and its images."""
    text = Text(f"<tool_response>\n{message.text}\n</tool_response>")
    return Message("user", (text, *message.images), message.origin)


def _write_call(call: ToolCall, tool_format: ToolFormat) -> str:
    """A call as text. Raises PromptRejected."""
    try:
        return tool_format.write(call.name, call.arguments)
    except RecursionError:
        raise PromptRejected("The tools or their calls are nested too deeply to be written.", "tools") from None
