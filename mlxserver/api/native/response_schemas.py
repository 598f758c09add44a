"""JSON schemas of answers about models and the server itself, by name."""

from __future__ import annotations

from typing import get_args

from mlxserver.api.openai.models import CAPABILITIES
from mlxserver.api.schema.response_shapes import (
    BOOLEAN,
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
EXECUTION = exactly(
    cache=one_of("slots", "merged", "single"),
    padded_prefill=BOOLEAN,
    compiled=BOOLEAN,
    speculation=BOOLEAN,
    draft=maybe(TEXT),
)
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
PLAN = {"model": TEXT, "download_bytes": COUNT, "needed_bytes": maybe(COUNT), "fits": BOOLEAN}
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

NATIVE_SCHEMAS: dict[str, Schema] = {
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
        capabilities=maybe(exactly(**dict.fromkeys(CAPABILITIES, BOOLEAN))),
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
        pinned=BOOLEAN,
        expires_in_seconds=maybe(NUMBER),
        loading=maybe(exactly(stage=TEXT, done=COUNT, total=COUNT)),
        local=maybe(exactly(**LOCAL)),
    ),
    "Deleted": exactly(id=TEXT, object=one_of("model"), deleted=BOOLEAN, freed_bytes=COUNT),
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
                gated=BOOLEAN,
                architecture=maybe(TEXT),
                quantization=maybe(TEXT),
                parameters=maybe(COUNT),
                size_bytes=maybe(COUNT),
                needed_bytes=maybe(COUNT),
                fits=maybe(FITS),
                is_local=BOOLEAN,
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
    "RequestList": exactly(object=one_of("list"), data=each(exactly(**REQUEST)), cursor=TEXT, is_whole=BOOLEAN),
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
    "Pinned": exactly(key=TEXT, pinned=BOOLEAN),
    "Rendered": exactly(html=each(TEXT)),
    "Session": exactly(**dict.fromkeys(("needs_key", "may_generate", "may_manage"), BOOLEAN)),
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
        wedged=BOOLEAN,
        preload=BOOLEAN,
        running_requests=COUNT,
        queued_requests=COUNT,
        error_=TEXT,
    ),
    "OpenAPI": {"type": "object"},
}
