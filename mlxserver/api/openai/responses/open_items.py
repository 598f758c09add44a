"""Items of an output while they grow, each with the events of the API that build it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

from mlxserver.api.openai.logprobs import chat_logprobs
from mlxserver.api.openai.responses.custom_input import CustomInput
from mlxserver.api.openai.responses.ids import Prefix, new_id
from mlxserver.api.openai.responses.tools import CallForm
from mlxserver.engine.events import Delta

ItemStatus = Literal["in_progress", "completed", "incomplete"]
StreamEvent = dict[str, Any]


class OpenItem(ABC):
    """Item that grows. index: its place in the output."""

    prefix: Prefix

    def __init__(self, index: int) -> None:
        self.id = new_id(self.prefix)
        self._index = index
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that it has been given."""
        return "".join(self._pieces)

    def start(self) -> Iterator[StreamEvent]:
        """Events that begin it."""
        item = {"type": "response.output_item.added", "output_index": self._index, "item": self.item("in_progress")}
        yield item

    def end(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Events that end it."""
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)}

    @abstractmethod
    def item(self, status: ItemStatus) -> dict[str, Any]:
        """The item as it is."""

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self._index, **fields}


class ReasoningItem(OpenItem):
    """Reasoning, as its own summary."""

    prefix = "rs"

    def start(self) -> Iterator[StreamEvent]:
        """Events that begin it."""
        yield from super().start()
        yield self._event("reasoning_summary_part.added", summary_index=0, part=self._part(""))

    def feed(self, text: str) -> StreamEvent:
        """Event of more reasoning."""
        self._pieces.append(text)
        return self._event("reasoning_summary_text.delta", summary_index=0, delta=text)

    def end(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Events that end it."""
        yield self._event("reasoning_summary_text.done", summary_index=0, text=self.text)
        yield self._event("reasoning_summary_part.done", summary_index=0, part=self._part(self.text))
        yield from super().end(status)

    def item(self, status: ItemStatus) -> dict[str, Any]:
        """The item as it is."""
        summary = [self._part(self.text)] if self._pieces else []
        return {"id": self.id, "type": "reasoning", "status": status, "summary": summary}

    def _part(self, text: str) -> dict[str, str]:
        return {"type": "summary_text", "text": text}


class MessageItem(OpenItem):
    """Text for the reader, with the log-probabilities of its tokens where they were asked for."""

    prefix = "msg"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[dict[str, Any]] = []

    def start(self) -> Iterator[StreamEvent]:
        """Events that begin it."""
        yield from super().start()
        yield self._event("content_part.added", content_index=0, part=self._part())

    def feed(self, delta: Delta) -> StreamEvent:
        """Event of more text."""
        self._pieces.append(delta.text)
        logprobs = chat_logprobs(delta.logprobs)["content"] if delta.logprobs else []
        self._logprobs += logprobs
        return self._event("output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs)

    def end(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Events that end it."""
        yield self._event("output_text.done", content_index=0, text=self.text, logprobs=self._logprobs)
        yield self._event("content_part.done", content_index=0, part=self._part())
        yield from super().end(status)

    def item(self, status: ItemStatus) -> dict[str, Any]:
        """The item as it is."""
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}


class CallItem(OpenItem):
    """A call. form: how it is given back."""

    kind: str
    field: str  # that its text has

    def __init__(self, index: int, call_id: str, form: CallForm) -> None:
        super().__init__(index)
        self._call_id = call_id
        self._form = form

    @abstractmethod
    def feed(self, arguments: str) -> Iterator[StreamEvent]:
        """Events of more arguments."""

    def item(self, status: ItemStatus) -> dict[str, Any]:
        """The item as it is."""
        namespace = {"namespace": self._form.namespace} if self._form.namespace else {}
        called = {"call_id": self._call_id, "name": self._form.name, **namespace, self.field: self.text}
        return {"id": self.id, "type": self.kind, "status": status, **called}


class FunctionCallItem(CallItem):
    """A call of a function."""

    prefix, kind, field = "fc", "function_call", "arguments"

    def feed(self, arguments: str) -> Iterator[StreamEvent]:
        """Event of more arguments."""
        self._pieces.append(arguments)
        if arguments:
            yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Events that end it."""
        yield self._event("function_call_arguments.done", name=self._form.name, arguments=self.text)
        yield from super().end(status)


class CustomCallItem(CallItem):
    """A call of a custom tool."""

    prefix, kind, field = "ctc", "custom_tool_call", "input"

    def __init__(self, index: int, call_id: str, form: CallForm) -> None:
        super().__init__(index, call_id, form)
        self._input = CustomInput()

    @property
    def text(self) -> str:
        """The text that the tool takes."""
        return self._input.text

    def feed(self, arguments: str) -> Iterator[StreamEvent]:
        """Event of more text."""
        if text := self._input.feed(arguments):
            yield self._event("custom_tool_call_input.delta", delta=text)

    def end(self, status: ItemStatus) -> Iterator[StreamEvent]:
        """Events that end it."""
        if rest := self._input.remainder:
            yield self._event("custom_tool_call_input.delta", delta=rest)
        yield self._event("custom_tool_call_input.done", input=self.text)
        yield from super().end(status)
