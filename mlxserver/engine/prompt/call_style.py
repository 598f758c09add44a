"""Call style: how calls and results of the history stand in the messages that a chat template gets."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.engine.conversation import Image, Message, Text, Tool, ToolCall, ToolResult
from mlxserver.engine.prompt.tool_text import write_json
from mlxserver.engine.requests import ChatPrompt

SHORT_ID = re.compile("[0-9A-Za-z]{9}")


@dataclass(frozen=True, slots=True)
class CallStyle:
    """Form of past calls that a template expects: arguments as JSON text, ids of nine letters and digits."""

    has_text_arguments: bool = False
    has_short_ids: bool = False

    def message(self, message: Message) -> dict[str, Any]:
        """A message as a template reads it, without its reasoning. Raises PromptRejected."""
        fields: dict[str, Any] = {"role": message.role, "content": message.text}
        if name := message.name:
            fields["name"] = name
        if message.role == "assistant":
            if calls := message.calls:
                fields["tool_calls"] = [self._call(call) for call in calls]
        elif message.role == "tool" and (result := message.result):
            fields["tool_call_id"] = self._id(result.call_id)
            if result.name:
                fields["name"] = result.name
        return fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.arguments
        if self.has_text_arguments:
            arguments = write_json(call.arguments) if call.text is None else call.text
        return {"type": "function", "id": self._id(call.id), "function": {"name": call.name, "arguments": arguments}}

    def _id(self, call_id: str) -> str:
        if not self.has_short_ids or SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


STYLES = tuple(CallStyle(text, short) for text in (False, True) for short in (False, True))

CALL_WORDS = ("probe_name", "probe_description", "probe_value", "probe_result")
CALL_PROBE = ChatPrompt(
    (
        Message("user", (Text("Hello"),)),
        Message("assistant", (ToolCall("call_0123456789abcdef", "probe_name", {"probe_key": "probe_value"}),)),
        Message("tool", (ToolResult("call_0123456789abcdef", "probe_result", "probe_name"),)),
    ),
    (Tool("probe_name", "probe_description", {"type": "object", "properties": {"probe_key": {"type": "string"}}}),),
)
RESULT_IMAGE_PROBE = replace(
    CALL_PROBE,
    conversation=(
        *CALL_PROBE.conversation[:2],
        Message("tool", (ToolResult("call_0123456789abcdef", "probe_result", "probe_name", (Image(b""),)),)),
    ),
)
