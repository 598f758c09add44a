"""Tools and their calls as messages: for a template that has a place for them, and as plain text for any other.

Rule 1: the plain format is the one of output/tool_formats.py, in the prompt and in the history alike.
Rule 2: in plain text a tool speaks as the user, inside tags of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.tool_formats import PLAIN
from mlxserver.engine.prompt.turns import Message, join

DESCRIPTION = """\
You can call functions. Each line here describes one, its parameters as a JSON schema:
{tools}

To call a function, write its name and its arguments as JSON between these tags, and nothing behind them:
{call}
For several calls, write several such blocks. The results come back between <tool_response> and </tool_response>.
Call a function only where it helps; otherwise answer in plain words."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """What a template expects of the calls in a history: arguments as JSON text, ids of nine letters and digits."""

    has_text_arguments: bool = False
    has_short_ids: bool = False

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Admitted messages, with their calls in this style."""
        return [self._restyle(message) for message in messages]

    def _restyle(self, message: Message) -> Message:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [self._restyle_call(call) for call in calls]}
        if "tool_call_id" in message:
            message = {**message, "tool_call_id": self._restyle_id(message["tool_call_id"])}
        return message

    def _restyle_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self.has_text_arguments:
            function = {**function, "arguments": _json(function["arguments"])}
        return {**call, "id": self._restyle_id(call["id"]), "function": function}

    def _restyle_id(self, call_id: str) -> str:
        if not self.has_short_ids:
            return call_id
        return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


STYLES = tuple(CallStyle(text, short) for text in (False, True) for short in (False, True))

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "probe_description",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
PROBE: list[Message] = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_0123456789abcdef",
                "type": "function",
                "function": {"name": "probe_name", "arguments": {"probe_key": "probe_value"}},
            }
        ],
    },
    {"role": "tool", "content": "probe_result", "tool_call_id": "call_0123456789abcdef", "name": "probe_name"},
]
PROBED = ("probe_name", "probe_description", "probe_value", "probe_result")


def describe(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages behind a system message that tells of the tools, and begins with the one they have."""
    lines = "\n".join(_json(tool["function"]) for tool in tools)
    call = _write_call("function_name", {"argument": "value"})
    system: Message = {"role": "system", "content": DESCRIPTION.format(tools=lines, call=call)}
    if messages and messages[0]["role"] == "system":
        return [join(messages[0], system), *messages[1:]]
    return [system, *messages]


def write_plain(messages: Sequence[Message]) -> list[Message]:
    """The messages with tool calls and results as text. A result is joined with the results or the user around it."""
    written: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        plain = _write_result(message) if is_result else _write_calls(message)
        if written and plain["role"] == "user" == written[-1]["role"] and (is_result or was_result):
            written[-1] = join(written[-1], plain)
        else:
            written.append(plain)
        was_result = is_result
    return written


def _write_calls(message: Message) -> Message:
    calls = message.get("tool_calls") or ()
    if not calls:
        return message
    texts = [_write_call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    content = "\n".join([*([message["content"]] if message["content"] else []), *texts])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _write_result(message: Message) -> Message:
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


def _write_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{PLAIN.start}\n{_json({'name': name, 'arguments': arguments})}\n{PLAIN.end}"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise PromptRejected("The tools or their calls are nested too deeply to be written.", "tools") from None
