"""JSON schemas of the answers of OpenAI's chats and completions, and of its errors, by name."""

from __future__ import annotations

from mlxserver.api.schema.response_shapes import (
    BYTES,
    COUNT,
    NUMBER,
    TEXT,
    Schema,
    by_key,
    each,
    exactly,
    maybe,
    named,
    one_of,
)

FINISH = one_of("stop", "length", "tool_calls")
CALL = exactly(id=TEXT, type=one_of("function"), function=exactly(name=TEXT, arguments=TEXT))
CALL_DELTA = exactly(index=COUNT, id_=TEXT, type_=one_of("function"), function=exactly(name_=TEXT, arguments=TEXT))
LOGPROBS = exactly(content=each(named("TokenLogprob")), refusal={"type": "null"})
REASONING = {"reasoning_content_": TEXT, "reasoning_": TEXT}
HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}
COUNTS = {"usage": named("Usage"), "timings": named("Timings")}

OPENAI_SCHEMAS: dict[str, Schema] = {
    "Error": exactly(
        error=exactly(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT)), projection_=named("Projection")
    ),
    "Projection": exactly(needed=COUNT, free=COUNT, evictable=COUNT, pinned=COUNT, busy=COUNT, budget=COUNT),
    "Usage": exactly(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=exactly(cached_tokens=COUNT),
        completion_tokens_details=exactly(reasoning_tokens=COUNT),
    ),
    "Timings": exactly(
        queue_ms=NUMBER,
        cache_n=COUNT,
        prompt_n=COUNT,
        prompt_ms=NUMBER,
        prompt_per_token_ms=NUMBER,
        prompt_per_second=NUMBER,
        predicted_n=COUNT,
        predicted_ms=NUMBER,
        predicted_per_token_ms=NUMBER,
        predicted_per_second=NUMBER,
    ),
    "TokenLogprob": exactly(
        token=TEXT,
        bytes=BYTES,
        logprob=NUMBER,
        top_logprobs=each(exactly(token=TEXT, bytes=BYTES, logprob=NUMBER)),
    ),
    "PromptLogprobs": each(maybe(by_key(exactly(logprob=NUMBER, rank=COUNT, decoded_token=TEXT)))),
    "ChatCompletion": exactly(
        object=one_of("chat.completion"),
        prompt_logprobs_=named("PromptLogprobs"),
        choices=each(
            exactly(
                index=COUNT,
                message=exactly(
                    role=one_of("assistant"),
                    content=maybe(TEXT),
                    refusal={"type": "null"},
                    tool_calls_=each(CALL),
                    **REASONING,
                ),
                logprobs=maybe(LOGPROBS),
                finish_reason=FINISH,
            )
        ),
        **HEAD,
        **COUNTS,
    ),
    "ChatCompletionChunk": exactly(
        object=one_of("chat.completion.chunk"),
        choices=each(
            exactly(
                index=COUNT,
                delta=exactly(role_=TEXT, content_=TEXT, tool_calls_=each(CALL_DELTA), **REASONING),
                logprobs_=LOGPROBS,
                finish_reason=maybe(FINISH),
            )
        ),
        **HEAD,
        **{f"{name}_": schema for name, schema in COUNTS.items()},
    ),
    "Completion": exactly(
        object=one_of("text_completion"),
        choices=each(
            exactly(
                index=COUNT,
                text=TEXT,
                logprobs=maybe(named("TextLogprobs")),
                finish_reason=FINISH,
                prompt_logprobs_=named("PromptLogprobs"),
            )
        ),
        **HEAD,
        **COUNTS,
    ),
    "CompletionChunk": exactly(
        object=one_of("text_completion"),
        choices=each(
            exactly(index=COUNT, text=TEXT, logprobs=maybe(named("TextLogprobs")), finish_reason=maybe(FINISH))
        ),
        **HEAD,
        **{f"{name}_": schema for name, schema in COUNTS.items()},
    ),
    "TextLogprobs": exactly(
        tokens=each(TEXT),
        token_logprobs=each(maybe(NUMBER)),
        top_logprobs=each(maybe(by_key(NUMBER))),
        text_offset=each(COUNT),
    ),
}
