"""Settings: frozen, built once from file, environment and flags. An error names key, value and expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelType = Literal["thinking", "instruction"]


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
    context_length: int | None = None
    max_running: int = 32
    max_waiting: int = 256
    prefix_cache_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """All of the server. stall_target: seconds that a prefill may hold running streams up."""

    host: str = "127.0.0.1"
    port: int = 8000
    log_level: str = "info"
    models: tuple[ModelSpec, ...] = ()
    stall_target: float = 0.25
    max_body_bytes: int = 16 << 20
    shutdown_timeout: float = 30.0
