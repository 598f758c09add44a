"""Token counts and times of an answer, as JSON objects."""

from __future__ import annotations

from typing import Any

from mlxserver.engine.events import Usage


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts of an answer."""
    return counts_object(
        usage.prompt_tokens, usage.completion_tokens, reasoning=usage.reasoning_tokens, cached=usage.cached_tokens
    )


def counts_object(prompt: int, completion: int, *, reasoning: int = 0, cached: int = 0) -> dict[str, Any]:
    """Token counts. Reasoning tokens are among the completion's, cached ones among the prompt's."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings_object(usage: Usage) -> dict[str, Any]:
    """Times in milliseconds, named as llama.cpp's server names them. Cached tokens took no time."""
    times, processed, generated = usage.timings, usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    return {
        "queue_ms": _milliseconds(times.queue),
        "cache_n": usage.cached_tokens,
        "prompt_n": processed,
        "prompt_ms": _milliseconds(times.prompt),
        "prompt_per_token_ms": _milliseconds(times.prompt / processed) if processed else 0.0,
        "prompt_per_second": round(processed / times.prompt, 3) if times.prompt else 0.0,
        "predicted_n": generated,
        "predicted_ms": _milliseconds(times.generation),
        "predicted_per_token_ms": _milliseconds(times.generation / generated) if generated else 0.0,
        "predicted_per_second": round(generated / times.generation, 3) if times.generation else 0.0,
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
