"""Reasoning forms: where the chat templates of different families read the reasoning of an earlier answer.

Rule 1: the form is found by trying: it is the first one with which the template shows the reasoning anywhere.
Rule 2: which answers' reasoning is shown is the template's matter; most show it since the last question alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.conversation import Message, Reasoning, Text, ToolCall, ToolResult
from mlxserver.engine.requests import ChatPrompt

_WORD = "probed_reasoning"
_TEXT = "probed_text"
_PRINTED_PARTS = ("'thinking'", '"thinking"')  # what a template shows that prints the parts as they are
_CALL = ToolCall("call_0123456789abcdef", "probe", {"key": "value"})
_QUESTION = Message("user", (Text("Hello"),))
_RESULT = Message("tool", (ToolResult(_CALL.id, "result", "probe"),))
_PROBES = (
    ChatPrompt((_QUESTION, Message("assistant", (Reasoning(_WORD), _CALL)), _RESULT)),
    ChatPrompt((_QUESTION, Message("assistant", (Reasoning(_WORD), Text(_TEXT))))),
    ChatPrompt((_QUESTION, Message("assistant", (Reasoning(_WORD), Text(_TEXT))), _QUESTION)),
)
_BESIDE_TEXT = ChatPrompt((_QUESTION, Message("assistant", (Reasoning(_WORD), Text(_TEXT), _CALL)), _RESULT))


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """Form of the reasoning in a message. field: its name; "content" for parts of the content.

    takes_text: whether a message with calls may have reasoning and text; otherwise both are its reasoning.
    """

    field: str
    takes_text: bool = True

    def put(self, message: dict[str, Any], reasoning: str) -> dict[str, Any]:
        """A template's message with the reasoning in it."""
        text = message["content"]
        if text and "tool_calls" in message and not self.takes_text:
            return {**message, "content": "", self.field: f"{reasoning}\n\n{text}"}
        if self.field != "content":
            return {**message, self.field: reasoning}
        parts = [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": text}]
        return {**message, "content": parts[: 2 if text else 1]}


FORMS = tuple(map(ReasoningForm, ("reasoning_content", "reasoning", "thinking", "thought", "content")))


def find_form(try_render: Callable[[ChatPrompt, ReasoningForm], str | None]) -> ReasoningForm:
    """The form in which a template reads reasoning; the commonest one where it reads none.

    try_render(prompt, form): the text, None where the template refuses it.
    """

    def shows(form: ReasoningForm, *prompts: ChatPrompt) -> bool:
        texts = [try_render(prompt, form) or "" for prompt in prompts]
        return any(_WORD in text and not any(printed in text for printed in _PRINTED_PARTS) for text in texts)

    form = next((form for form in FORMS if shows(form, *_PROBES)), FORMS[0])
    alone = ReasoningForm(form.field, takes_text=False)
    return alone if shows(alone, _BESIDE_TEXT) and not shows(form, _BESIDE_TEXT) else form
