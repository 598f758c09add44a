"""What is told of an answer once it is there: its figures in one line, or as JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxserver.client.events import Usage
from mlxserver.client.stats import Timing


def format_status(model: str, timing: Timing, context_length: int | None) -> str:
    """Model, tokens, tokens/s, TTFT, cached tokens and context used; what is not known is left out."""
    parts = [model]
    if usage := timing.usage:
        thinking = f" ({usage.reasoning_tokens} thinking)" if usage.reasoning_tokens else ""
        parts.append(f"{usage.completion_tokens} tokens{thinking}")
    if timing.tokens_per_second is not None:
        parts.append(f"{timing.tokens_per_second:.1f} tokens/s")
    if timing.ttft is not None:
        parts.append(f"TTFT {timing.ttft * 1000:.0f} ms")
    if usage:
        parts.append(f"{usage.cached_tokens} cached")
        parts.append(f"context {format_context(usage, context_length)}")
    return " · ".join(parts)


def format_context(usage: Usage, context_length: int | None) -> str:
    """Tokens of the conversation so far, and how many there may be."""
    used = usage.prompt_tokens + usage.completion_tokens
    return f"{used}/{context_length}" if context_length else str(used)


def figures(timing: Timing) -> dict[str, Any]:
    """The figures of one answer for JSON: times in milliseconds, None where not known."""
    return {
        "ttft_ms": milliseconds(timing.ttft),
        "latency_ms": milliseconds(timing.latency),
        "tokens_per_second": timing.tokens_per_second,
        "usage": usage_object(timing.usage),
    }


def usage_object(usage: Usage | None) -> Mapping[str, int] | None:
    """Token counts for JSON."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cached_tokens": usage.cached_tokens,
    }


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds, None as it is."""
    return None if seconds is None else seconds * 1000
