"""JSON schemas of all answers, by name."""

from __future__ import annotations

from typing import get_args

from mlxserver.api.anthropic.response_schemas import ANTHROPIC_SCHEMAS
from mlxserver.api.native.rerank import RERANK_SCHEMAS
from mlxserver.api.ollama.schemas import OLLAMA_SCHEMAS
from mlxserver.api.openai.embeddings import EMBEDDINGS_SCHEMAS
from mlxserver.api.openai.models import CAPABILITIES
from mlxserver.api.openai.responses.schemas import RESPONSES_SCHEMAS
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
from mlxserver.config.settings import Kind, Weights

STATE = one_of("unloaded", "loading", "loaded", "draining", "failed")
FINISH = one_of("stop", "length", "tool_calls")
CALL = exactly(id=TEXT, type=one_of("function"), function=exactly(name=TEXT, arguments=TEXT))
CALL_DELTA = exactly(index=COUNT, id_=TEXT, type_=one_of("function"), function=exactly(name_=TEXT, arguments=TEXT))
LOGPROBS = exactly(content=each(named("TokenLogprob")), refusal={"type": "null"})
REASONING = {"reasoning_content_": TEXT, "reasoning_": TEXT}
HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}
COUNTS = {"usage": named("Usage"), "timings": named("Timings")}

EXECUTION = exactly(
    cache=one_of("slots", "merged", "single"),
    padded_prefill={"type": "boolean"},
    compiled={"type": "boolean"},
    speculation={"type": "boolean"},
    draft=maybe(TEXT),
)
BOOLEAN = {"type": "boolean"}
POLICY = exactly(
    compile_steps=BOOLEAN,
    pad_slots=BOOLEAN,
    bucket_prefill=BOOLEAN,
    fuse_projections=BOOLEAN,
    fuse_layers=BOOLEAN,
    decode_kernel=BOOLEAN,
    weights=one_of("stored", "quantized", "bfloat16", "float32"),
    fixed=each(TEXT),
    measured=each(TEXT),
)
ESTIMATE = exactly(weights=COUNT, cache=COUNT, activations=COUNT, total=COUNT)
FITS = one_of("now", "after_eviction", "never")
LOCAL = {
    "place": one_of("directory", "huggingface", "lmstudio", "ollama"),
    "format": maybe(one_of("mlx", "gguf")),
    "architecture": maybe(TEXT),
    "quantization": maybe(TEXT),
    "parameters": maybe(COUNT),
    "size_bytes": COUNT,
    "needed_bytes": maybe(COUNT),
    "fits": maybe(FITS),
}
PLAN = {"model": TEXT, "download_bytes": COUNT, "needed_bytes": maybe(COUNT), "fits": {"type": "boolean"}}

REQUEST: dict[str, Schema] = {
    "id": TEXT,
    "arrived": NUMBER,
    "model": maybe(TEXT),
    "dialect": TEXT,
    "path": TEXT,
    "client": TEXT,
    "address": TEXT,
    "key": maybe(TEXT),
    "status": maybe(COUNT),
    "outcome": TEXT,
    "error": maybe(TEXT),
    "seconds": NUMBER,
    "load_seconds": NUMBER,
    "queue_seconds": maybe(NUMBER),
    "ttft_seconds": maybe(NUMBER),
    "tokens_per_second": maybe(NUMBER),
    "prompt_tokens": maybe(COUNT),
    "cached_tokens": maybe(COUNT),
    "completion_tokens": maybe(COUNT),
    "reasoning_tokens": maybe(COUNT),
}

RESPONSE_SCHEMAS: dict[str, Schema] = {
    **RESPONSES_SCHEMAS,
    **EMBEDDINGS_SCHEMAS,
    **RERANK_SCHEMAS,
    **ANTHROPIC_SCHEMAS,
    **OLLAMA_SCHEMAS,
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
    "Model": exactly(
        id=TEXT,
        object=one_of("model"),
        created=COUNT,
        owned_by=TEXT,
        status=exactly(value=STATE, error_=TEXT),
        kind=maybe(one_of(*get_args(Kind))),
        type=maybe(one_of("thinking", "instruction")),
        source=TEXT,
        context_length=maybe(COUNT),
        max_model_len=maybe(COUNT),
        meta=exactly(n_ctx_train=maybe(COUNT)),
        capabilities=maybe(exactly(**{name: {"type": "boolean"} for name in CAPABILITIES})),
        execution=maybe(EXECUTION),
        policy=maybe(POLICY),
        weights=one_of(*get_args(Weights)),
        kv_bits=maybe(COUNT),
        kv_group_size=maybe(COUNT),
        memory_bytes=COUNT,
        reserved_bytes=COUNT,
        estimate=maybe(ESTIMATE),
        running_requests=COUNT,
        queued_requests=COUNT,
        aliases=each(TEXT),
        pinned={"type": "boolean"},
        expires_in_seconds=maybe(NUMBER),
        loading=maybe(exactly(stage=TEXT, done=COUNT, total=COUNT)),
        local=maybe(exactly(**LOCAL)),
    ),
    "Deleted": exactly(id=TEXT, object=one_of("model"), deleted={"type": "boolean"}, freed_bytes=COUNT),
    "Library": exactly(
        object=one_of("list"),
        data=each(
            exactly(
                id=TEXT,
                aliases=each(TEXT),
                status=exactly(value=STATE, error_=TEXT),
                kind=maybe(one_of(*get_args(Kind))),
                context_length=maybe(COUNT),
                path=maybe(TEXT),
                error=maybe(TEXT),
                **LOCAL,
            )
        ),
    ),
    "SearchResults": exactly(
        object=one_of("list"),
        data=each(
            exactly(
                id=TEXT,
                downloads=COUNT,
                likes=COUNT,
                updated=maybe(TEXT),
                gated={"type": "boolean"},
                architecture=maybe(TEXT),
                quantization=maybe(TEXT),
                parameters=maybe(COUNT),
                size_bytes=maybe(COUNT),
                needed_bytes=maybe(COUNT),
                fits=maybe(FITS),
                is_local={"type": "boolean"},
            )
        ),
    ),
    "Pulled": exactly(event=one_of("pulled"), path=TEXT, **PLAN),
    "PullStep": {
        "anyOf": [
            exactly(event=one_of("planned"), **PLAN),
            exactly(event=one_of("progress"), stage=TEXT, done=COUNT, total=COUNT),
            exactly(event=one_of("pulled"), path=TEXT, **PLAN),
        ]
    },
    "ModelList": exactly(object=one_of("list"), data=each(named("Model"))),
    "Loaded": exactly(
        event=one_of("loaded"),
        key=TEXT,
        status=one_of("loaded"),
        load_time_seconds=NUMBER,
        memory_bytes=COUNT,
        reserved_bytes=COUNT,
        estimate=maybe(ESTIMATE),
    ),
    "LoadProgress": exactly(event=one_of("progress"), stage=TEXT, done=COUNT, total=COUNT),
    "CacheUsage": exactly(
        object=one_of("list"),
        data=each(exactly(tier=one_of("ram", "disk"), model=TEXT, entries=COUNT, bytes=COUNT, hits=COUNT)),
        disk=maybe(exactly(entries=COUNT, bytes=COUNT, hits=COUNT)),
    ),
    "Reloaded": exactly(added=each(TEXT), removed=each(TEXT), changed=each(TEXT), restart_needed=each(TEXT)),
    "RequestList": exactly(
        object=one_of("list"), data=each(exactly(**REQUEST)), cursor=TEXT, is_whole={"type": "boolean"}
    ),
    "RequestTrace": exactly(
        spans=each(
            exactly(
                name=one_of("read", "prepare", "load", "queue", "prefill", "decode"),
                start=NUMBER,
                end=NUMBER,
                tokens=maybe(COUNT),
            )
        ),
        prompt=maybe(TEXT),
        answer=maybe(TEXT),
        **REQUEST,
    ),
    "Pinned": exactly(key=TEXT, pinned={"type": "boolean"}),
    "Rendered": exactly(html=each(TEXT)),
    "Session": exactly(**{name: {"type": "boolean"} for name in ("needs_key", "may_generate", "may_manage")}),
    "Unloaded": exactly(
        key=TEXT,
        status=one_of("unloaded"),
        completed_requests=COUNT,
        aborted_requests=COUNT,
        freed_bytes=COUNT,
    ),
    "Tokens": exactly(count=COUNT, tokens=each(COUNT), max_model_len=maybe(COUNT)),
    "Prompt": exactly(prompt=TEXT),
    "Health": exactly(
        status=one_of("ok", "degraded"),
        version_=TEXT,
        uptime_seconds_=NUMBER,
        models_=by_key(named("ModelHealth")),
        ranks_=each(named("RankHealth")),
    ),
    "RankHealth": exactly(rank=COUNT, status=one_of("ok", "lost"), memory_bytes=COUNT, error_=TEXT),
    "Ready": exactly(status=one_of("ready"), models=by_key(named("ModelHealth"))),
    "ModelHealth": exactly(
        status=STATE,
        wedged={"type": "boolean"},
        preload={"type": "boolean"},
        running_requests=COUNT,
        queued_requests=COUNT,
        error_=TEXT,
    ),
    "OpenAPI": {"type": "object"},
}
