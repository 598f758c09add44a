"""Output of a response: the items that events become, and the events of the API that build them.

Rule 1: one item is open at a time. It is added, grows, and is done; what comes next is another one.
Rule 2: white space before an item of another kind is no message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

from mlxserver.api.openai.logprobs import chat_logprobs
from mlxserver.api.openai.responses.custom_input import CustomInput
from mlxserver.api.openai.responses.ids import Prefix, new_id
from mlxserver.api.openai.responses.tools import CallForm, ToolSet
from mlxserver.engine.events import Delta, Event, Finish, ToolCallDelta

ItemStatus = Literal["in_progress", "completed", "incomplete"]
StreamEvent = dict[str, Any]


class Output:
    """Output of one response. items: those that are done. is_cut: whether it ended at the limit of tokens."""

    def __init__(self, tools: ToolSet) -> None:
        self.items: list[dict[str, Any]] = []
        self.is_cut = False
        self._tools = tools
        self._open: OpenItem | None = None
        self._blanks: list[Delta] = []

    def feed(self, event: Event) -> Iterator[StreamEvent]:
        """The events that an engine's event becomes."""
        match event:
            case Delta(text, "reasoning"):
                yield from self._grow(ReasoningItem, text)
            case Delta():
                yield from self._feed_text(event)
            case ToolCallDelta():
                yield from self._feed_call(event)
            case Finish(reason):
                self.is_cut = reason == "length"
                if not self.items and not self._open:
                    yield from self._flush_blanks()
                yield from self._close("incomplete" if self.is_cut else "completed")

    @property
    def all_items(self) -> list[dict[str, Any]]:
        """The items with the open one, as it is."""
        return [*self.items, self._open.item("incomplete")] if self._open else self.items

    def _feed_text(self, delta: Delta) -> Iterator[StreamEvent]:
        if not isinstance(self._open, MessageItem):
            self._blanks.append(delta)
            if not delta.text.strip():
                return
            yield from self._flush_blanks()
        else:
            yield self._open.feed(delta)

    def _flush_blanks(self) -> Iterator[StreamEvent]:
        message = MessageItem(len(self.items) + bool(self._open))
        yield from self._switch_to(message)
        yield from [message.feed(delta) for delta in self._blanks]
        self._blanks = []

    def _feed_call(self, delta: ToolCallDelta) -> Iterator[StreamEvent]:
        if delta.id is not None:
            form = self._tools.form(delta.name or "")
            kind = CustomCallItem if form.is_custom else FunctionCallItem
            yield from self._switch_to(kind(len(self.items) + bool(self._open), delta.id, form))
        if isinstance(self._open, CallItem):
            yield from self._open.feed(delta.arguments)

    def _grow(self, kind: type[ReasoningItem], text: str) -> Iterator[StreamEvent]:
        if not isinstance(self._open, kind):
            yield from self._switch_to(kind(len(self.items) + bool(self._open)))
        assert isinstance(self._open, kind)
        yield self._open.feed(text)

    def _switch_to(self, item: OpenItem) -> Iterator[StreamEvent]:
        yield from self._close("completed")
        if not isinstance(item, MessageItem):
            self._blanks = []
        self._open = item
        yield from item.start()

    def _close(self, status: ItemStatus) -> Iterator[StreamEvent]:
        if self._open is None:
            return
        yield from self._open.end(status)
        self.items.append(self._open.item(status))
        self._open = None


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
