"""Settings: frozen, built once from file, environment and flags (config/load.py).

Rule: a setting is one line here. Its annotation says what it accepts, and makes its TOML key, environment variable
      and flag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mlxserver.config.fields import Range, Size
from mlxserver.config.http import HttpSettings

ModelType = Literal["thinking", "instruction"]
Shard = Literal["tensor", "pipeline"]
LogFormat = Literal["text", "json"]
ReasoningFormat = Literal["reasoning_content", "reasoning", "inline"]
UnknownParameters = Literal["refuse", "ignore"]
LogLevel = Literal["critical", "error", "warning", "info", "debug"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One registered model.

    key: the name in requests. source: Hugging Face id, MLX directory, .gguf file or embedded:NAME (loading/sources.py).
    type: None finds it out from template and tokenizer. adapter: directory of a LoRA adapter. preload: load at start.
    context_length: tokens, None takes the model's own, as far as cache_tokens go. max_running, max_waiting: requests
    decoding together, and waiting for a place. prefix_cache_bytes: what finished prompts may keep, within the cache.
    cache_tokens: tokens whose keys and values all requests together may hold, None is loading/estimate.py's choice.
    aliases: more names in requests. pin: never evicted. ttl: seconds without a request until it is unloaded, None
    takes the server's. defaults: sampling parameters where a request states none (config/sampling_params.py). shard:
    how several ranks share it (loading/sharding.py), None: rank 0 has it alone.
    """

    key: str
    source: str
    type: ModelType | None = None
    adapter: str | None = None
    preload: bool = False
    context_length: Annotated[int | None, Range(1)] = None
    max_running: Annotated[int, Range(1)] = 32
    max_waiting: Annotated[int, Range(0)] = 256
    prefix_cache_bytes: Annotated[int, Range(0), Size()] = 1 << 30
    cache_tokens: Annotated[int | None, Range(16)] = None
    aliases: tuple[str, ...] = ()
    pin: bool = False
    ttl: Annotated[float | None, Range(0)] = None
    defaults: Mapping[str, float] = field(default_factory=dict)
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Settings(HttpSettings):
    """All of the server. Times are in seconds, sizes in bytes."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, Range(0, 65535), "port to listen on; 0 takes a free one"] = 8000
    log_level: Annotated[LogLevel, "what to log"] = "info"
    models: tuple[ModelSpec, ...] = ()
    stall_target: Annotated[float, Range(0.001, 60), "seconds that a prefill may hold running streams up"] = 0.25
    shutdown_timeout: Annotated[float, Range(0, 86_400), "seconds that running requests get to finish at the end"] = (
        30.0
    )
    memory_limit: Annotated[int, Range(0), Size(), "memory that all models may take; 0: a share of the device's"] = 0
    min_residency: Annotated[float, Range(0), "seconds that a model in use keeps its place against one that waits"] = (
        10.0
    )
    max_wait: Annotated[
        float, Range(0), "seconds after which a request gets its model a place, min_residency or not"
    ] = 30.0
    ttl: Annotated[float, Range(0), "seconds without a request until a model is unloaded; inf: never"] = math.inf
    wedged_after: Annotated[float, Range(1), "seconds without a step after which a busy engine counts as wedged"] = (
        120.0
    )
    load_on_demand: Annotated[bool, "load a registered model at its first request"] = True
    allow_any_model: Annotated[bool, "let a request load any Hugging Face id"] = False
    log_format: Annotated[LogFormat, "a line for people, or a JSON object, for each event"] = "text"
    unknown_parameters: Annotated[UnknownParameters, "what to do with request parameters that do not exist"] = "refuse"
    reasoning_format: Annotated[ReasoningFormat, "where reasoning goes in answers"] = "reasoning_content"
    rank_timeout: Annotated[float, Range(1, 3600), "seconds of silence until another rank counts as lost"] = 20.0
