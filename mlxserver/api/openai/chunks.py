"""The chunks of streams, as server-sent events ready to send.

Rule 1: what all chunks of a stream share is encoded once; a token costs one small join.
Rule 2: in order, for each choice: its beginning, its pieces, its finish; usage once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

Json = Mapping[str, Any]


class ChunkEncoder:
    """The frame of every chunk. head is made by responses.head()."""

    def __init__(self, head: Json) -> None:
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._tail = b"]}\n\n"

    def count(self, usage: Json) -> None:
        """From here on every chunk has these token counts, made by responses.usage()."""
        self._tail = b'],"usage":%b}\n\n' % orjson.dumps(usage)

    def usage(self, usage: Json, timings: Json) -> bytes:
        """The chunk after the last choice, without choices."""
        return b'%b],"usage":%b,"timings":%b}\n\n' % (self._head, orjson.dumps(usage), orjson.dumps(timings))

    def _choice(self, index: int, members: bytes) -> bytes:
        return b'%b{"index":%d,%b}%b' % (self._head, index, members, self._tail)


class ChatChunkEncoder(ChunkEncoder):
    """The chunks of a chat."""

    def role(self, index: int = 0) -> bytes:
        """The first chunk of a choice."""
        return self._delta(b'"role":"assistant"', index)

    def content(self, text: str, index: int = 0, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        """A piece of the answer. logprobs are made by responses.token_logprob()."""
        member = b'"content":' + orjson.dumps(text)
        if logprobs is None:
            return self._delta(member, index)
        told = orjson.dumps({"content": logprobs, "refusal": None})
        return self._choice(index, b'"delta":{%b},"logprobs":%b,"finish_reason":null' % (member, told))

    def reasoning(self, text: str, index: int = 0, field: str = "reasoning_content") -> bytes:
        """A piece of the reasoning."""
        return self._delta(b'"%b":%b' % (field.encode(), orjson.dumps(text)), index)

    def tool_call(
        self, call: int, arguments: str, index: int = 0, *, id: str | None = None, name: str | None = None
    ) -> bytes:
        """A piece of the call of this number. Its first piece has the id and the name."""
        piece: dict[str, Any] = {"index": call, "function": {"arguments": arguments}}
        if id is not None:
            piece = {"index": call, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return self._delta(b'"tool_calls":' + orjson.dumps([piece]), index)

    def finish(self, reason: str, index: int = 0) -> bytes:
        """The last chunk of a choice."""
        return self._delta(b"", index, orjson.dumps(reason))

    def _delta(self, member: bytes, index: int, reason: bytes = b"null") -> bytes:
        return self._choice(index, b'"delta":{%b},"finish_reason":%b' % (member, reason))


class TextChunkEncoder(ChunkEncoder):
    """The chunks of a bare completion."""

    def text(self, text: str, index: int = 0, logprobs: Json | None = None) -> bytes:
        """A piece of the answer. logprobs are made by responses.text_logprobs()."""
        return self._text(text, index, logprobs, None)

    def finish(self, reason: str, index: int = 0) -> bytes:
        """The last chunk of a choice."""
        return self._text("", index, None, reason)

    def _text(self, text: str, index: int, logprobs: Json | None, reason: str | None) -> bytes:
        members = (orjson.dumps(text), orjson.dumps(logprobs), orjson.dumps(reason))
        return self._choice(index, b'"text":%b,"logprobs":%b,"finish_reason":%b' % members)
