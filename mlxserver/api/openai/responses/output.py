"""Output of a response: the items that events become, and the events of the API that build them.

Rule 1: one item is open at a time. It is added, grows, and is done; what comes next is another one.
Rule 2: white space before an item of another kind is no message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlxserver.api.openai.responses.open_items import (
    CallItem,
    CustomCallItem,
    FunctionCallItem,
    ItemStatus,
    MessageItem,
    OpenItem,
    ReasoningItem,
    StreamEvent,
)
from mlxserver.api.openai.responses.tools import ToolSet
from mlxserver.engine.events import Delta, Event, Finish, ToolCallDelta


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
                yield from self._feed_reasoning(text)
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

    @property
    def _next_index(self) -> int:
        return len(self.items) + (self._open is not None)

    def _feed_reasoning(self, text: str) -> Iterator[StreamEvent]:
        item = self._open if isinstance(self._open, ReasoningItem) else ReasoningItem(self._next_index)
        if item is not self._open:
            yield from self._switch_to(item)
        yield item.feed(text)

    def _feed_text(self, delta: Delta) -> Iterator[StreamEvent]:
        if not isinstance(self._open, MessageItem):
            self._blanks.append(delta)
            if not delta.text.strip():
                return
            yield from self._flush_blanks()
        else:
            yield self._open.feed(delta)

    def _flush_blanks(self) -> Iterator[StreamEvent]:
        message = MessageItem(self._next_index)
        yield from self._switch_to(message)
        yield from [message.feed(delta) for delta in self._blanks]
        self._blanks = []

    def _feed_call(self, delta: ToolCallDelta) -> Iterator[StreamEvent]:
        if delta.id is not None:
            form = self._tools.form(delta.name or "")
            kind = CustomCallItem if form.is_custom else FunctionCallItem
            yield from self._switch_to(kind(self._next_index, delta.id, form))
        if isinstance(self._open, CallItem):
            yield from self._open.feed(delta.arguments)

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
