"""Every JSON shape that the server answers, from plain values. The chunks of streams are in api/openai/chunks.py.

Rule: what there was none of is left out, unless OpenAI has null there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4


def completion_id(prefix: str = "chatcmpl") -> str:
    """A new id of a completion."""
    return f"{prefix}-{uuid4().hex}"


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


def timings(
    *,
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    queue_seconds: float,
    prompt_seconds: float,
    generation_seconds: float,
) -> dict[str, Any]:
    """Where the time went, in milliseconds, named as llama.cpp's server names it. Cached tokens took no time."""
    processed = prompt_tokens - cached_tokens
    return {
        "queue_ms": _milliseconds(queue_seconds),
        "cache_n": cached_tokens,
        "prompt_n": processed,
        "prompt_ms": _milliseconds(prompt_seconds),
        "prompt_per_token_ms": _milliseconds(prompt_seconds / processed) if processed else 0.0,
        "prompt_per_second": round(processed / prompt_seconds, 3) if prompt_seconds else 0.0,
        "predicted_n": completion_tokens,
        "predicted_ms": _milliseconds(generation_seconds),
        "predicted_per_token_ms": _milliseconds(generation_seconds / completion_tokens) if completion_tokens else 0.0,
        "predicted_per_second": round(completion_tokens / generation_seconds, 3) if generation_seconds else 0.0,
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool. arguments is JSON text."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def token_logprob(text: str, raw: bytes, logprob: float, top: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A token with its log-probability. top holds the likeliest ones at its place, each made by this without a top."""
    token: dict[str, Any] = {"token": text, "bytes": list(raw), "logprob": logprob}
    return token if top is None else token | {"top_logprobs": list(top)}


def chat_choice(
    content: str,
    finish_reason: str,
    *,
    index: int = 0,
    reasoning: Mapping[str, str] | None = None,
    tool_calls: Sequence[dict[str, Any]] = (),
    logprobs: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One answer of a chat; one of calls alone has null for its content.

    reasoning is {field: text}; tool_calls are made by tool_call(), logprobs by token_logprob().
    """
    message: dict[str, Any] = {"role": "assistant", "content": content or None if tool_calls else content}
    message["refusal"] = None
    message |= reasoning or {}
    if tool_calls:
        message["tool_calls"] = list(tool_calls)
    told = None if logprobs is None else {"content": list(logprobs), "refusal": None}
    return {"index": index, "message": message, "logprobs": told, "finish_reason": finish_reason}


def text_choice(
    text: str, finish_reason: str, *, index: int = 0, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One answer of a bare completion. logprobs are made by text_logprobs()."""
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def text_logprobs(
    tokens: Sequence[str],
    token_logprobs: Sequence[float],
    top_logprobs: Sequence[Mapping[str, float]],
    text_offset: Sequence[int],
) -> dict[str, Any]:
    """Log-probabilities in the shape of bare completions, an item a token; offsets are in characters."""
    return {
        "tokens": list(tokens),
        "token_logprobs": list(token_logprobs),
        "top_logprobs": [dict(top) for top in top_logprobs],
        "text_offset": list(text_offset),
    }


def completion(
    head: Mapping[str, Any],
    choices: Sequence[dict[str, Any]],
    usage: dict[str, Any],
    timings: dict[str, Any],
) -> dict[str, Any]:
    """A whole answer. head is made by head(), choices by chat_choice() or text_choice(), usage by usage()."""
    return {**head, "choices": list(choices), "usage": usage, "timings": timings}


def head(id: str, object: str, model: str, created: int, fingerprint: str) -> dict[str, Any]:
    """What an answer and its chunks begin with. created is in seconds since 1970; fingerprint tells the versions."""
    return {"id": id, "object": object, "created": created, "model": model, "system_fingerprint": fingerprint}


def tokens(tokens: Sequence[int], context_length: int | None) -> dict[str, Any]:
    """The answer to a tokenize."""
    return {"count": len(tokens), "tokens": list(tokens), "max_model_len": context_length}


def prompt(text: str) -> dict[str, Any]:
    """The answer to a detokenize, and to an apply-template."""
    return {"prompt": text}


def error(message: str, type: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The envelope of every failure. Text from outside (a file's name) may hold surrogates, which JSON can't."""
    encodable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": encodable, "type": type, "param": param, "code": code}}
