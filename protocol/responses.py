"""Every JSON shape that the server answers, from plain values.

Rule 1: builders return plain dicts; only a stream's chunks are ready bytes, because there is one for every token.
Rule 2: "reasoning_content" is there only when there is reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import orjson

OWNER = "mlx-server"


def completion_id() -> str:
    """A new id of a chat completion."""
    return f"chatcmpl-{uuid4().hex}"


def usage(
    prompt_tokens: int, completion_tokens: int, *, reasoning_tokens: int = 0, cached_tokens: int = 0
) -> dict[str, Any]:
    """Token counts. Reasoning tokens are among the completion's, cached ones among the prompt's."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def choice(content: str, finish_reason: str, *, reasoning: str = "", index: int = 0) -> dict[str, Any]:
    """One answer of a whole completion."""
    message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


def completion(
    id: str, model: str, created: int, choices: Sequence[dict[str, Any]], usage: dict[str, Any]
) -> dict[str, Any]:
    """A whole answer. created is in seconds since 1970; choices are made by choice(), usage by usage()."""
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": list(choices),
        "usage": usage,
    }


class ChunkEncoder:
    """The chunks of one stream, as events ready to send. Their common part is encoded once.

    In order: role, then reasoning and content, then finish, for each choice; usage once at the end.
    """

    def __init__(self, id: str, model: str, created: int) -> None:
        head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['

    def role(self, index: int = 0) -> bytes:
        """The first chunk of a choice."""
        return self._delta(b'"role":"assistant"', index)

    def content(self, text: str, index: int = 0) -> bytes:
        """A piece of the answer."""
        return self._delta(b'"content":' + orjson.dumps(text), index)

    def reasoning(self, text: str, index: int = 0) -> bytes:
        """A piece of the reasoning."""
        return self._delta(b'"reasoning_content":' + orjson.dumps(text), index)

    def finish(self, reason: str, index: int = 0) -> bytes:
        """The last chunk of a choice."""
        return self._delta(b"", index, orjson.dumps(reason))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last choice, without choices. usage is made by usage()."""
        return b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage))

    def _delta(self, member: bytes, index: int, reason: bytes = b"null") -> bytes:
        return b'%b{"index":%d,"delta":{%b},"finish_reason":%b}]}\n\n' % (self._head, index, member, reason)


def error(message: str, type: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The envelope of every failure. Text from outside (a file's name) may hold surrogates, which JSON can't."""
    encodable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": encodable, "type": type, "param": param, "code": code}}


def model(
    key: str,
    *,
    created: int,
    status: str,
    source: str,
    type: str | None = None,
    context_length: int | None = None,
    memory_bytes: int = 0,
    running: int = 0,
    queued: int = 0,
    failure: str | None = None,
) -> dict[str, Any]:
    """One registered model. type and context_length are None while not known; failure is why the last load failed."""
    return {
        "id": key,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "status": {"value": status} if failure is None else {"value": status, "error": failure},
        "type": type,
        "source": source,
        "context_length": context_length,
        "memory_bytes": memory_bytes,
        "running_requests": running,
        "queued_requests": queued,
    }


def model_list(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All registered models, each made by model()."""
    return {"object": "list", "data": list(models)}


def loaded(key: str, *, load_time_seconds: float, memory_bytes: int) -> dict[str, Any]:
    """The answer to a load."""
    return {
        "key": key,
        "status": "loaded",
        "load_time_seconds": round(load_time_seconds, 3),
        "memory_bytes": memory_bytes,
    }


def unloaded(key: str, *, completed: int, aborted: int, freed_bytes: int) -> dict[str, Any]:
    """The answer to an unload: requests that it let finish, requests that it ended, and memory given back."""
    return {
        "key": key,
        "status": "unloaded",
        "completed_requests": completed,
        "aborted_requests": aborted,
        "freed_bytes": freed_bytes,
    }
