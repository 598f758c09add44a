"""Checkpoint metadata: what can be known of a model before its weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

log = logging.getLogger("engine")

FALLBACK_CONTEXT = 4096  # tokens
CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """config: the model's config.json. stored_bytes: its weights as they are stored, without the files' headers."""

    config: Mapping[str, Any]
    stored_bytes: int


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a configuration that may describe its text model: itself, and what is nested in it.

    In a config.json those are objects; in the arguments that mlx-lm makes of one, some are dataclasses.
    """
    yield config
    for name in TEXT_CONFIGS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield part
        elif is_dataclass(part):
            yield vars(part)


def context_length(key: str, config: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states; FALLBACK_CONTEXT, and a line in the log, if none."""
    for part in text_configs(config):
        for name in CONTEXT_KEYS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK_CONTEXT)
    return FALLBACK_CONTEXT


def attention_heads(config: Mapping[str, Any]) -> int:
    """Attention heads of the architecture that a config.json, or mlx-lm's arguments, describe; 0 if they do not say."""
    stated = (part.get("num_attention_heads") for part in text_configs(config))
    return next((int(number) for number in stated if number), 0)
