"""Settings: frozen, built once from file, environment and flags (engine/config_sources.py).

Rule: a setting is one line here. Its annotation says what it accepts, and makes its TOML key, environment variable
      and flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from engine.config_fields import Range

ModelType = Literal["thinking", "instruction"]
LogLevel = Literal["critical", "error", "warning", "info", "debug"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One registered model.

    key: the name in requests. source: Hugging Face id, MLX directory, .gguf file or embedded:NAME (engine/sources.py).
    type: None finds it out from template and tokenizer. adapter: directory of a LoRA adapter. preload: load at start.
    context_length: tokens, None takes the model's own. max_running, max_waiting: requests decoding together, and
    waiting for a place. prefix_cache_bytes: what finished prompts may keep.
    """

    key: str
    source: str
    type: ModelType | None = None
    adapter: str | None = None
    preload: bool = False
    context_length: Annotated[int | None, Range(1)] = None
    max_running: Annotated[int, Range(1)] = 32
    max_waiting: Annotated[int, Range(0)] = 256
    prefix_cache_bytes: Annotated[int, Range(0)] = 1 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """All of the server. stall_target: seconds that a prefill may hold running streams up."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, Range(0, 65535), "port to listen on; 0 takes a free one"] = 8000
    log_level: Annotated[LogLevel, "what to log"] = "info"
    models: tuple[ModelSpec, ...] = ()
    stall_target: Annotated[float, Range(0.001, 60), "seconds that a prefill may hold running streams up"] = 0.25
    max_body_bytes: Annotated[int, Range(1), "longest request body"] = 16 << 20
    shutdown_timeout: Annotated[float, Range(0, 86_400), "seconds that running requests get to finish at the end"] = (
        30.0
    )
