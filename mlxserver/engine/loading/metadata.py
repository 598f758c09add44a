"""Checkpoint metadata: facts of a model from its files, before its weights are read."""

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
    """Metadata of a checkpoint. config: its config.json. stored_bytes: size of its weights in their stored format."""

    config: Mapping[str, Any]
    stored_bytes: int


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a configuration that may describe its text model: itself and its nested ones.

    In a config.json they are objects; in the arguments that mlx-lm makes of it, some are dataclasses.
    """
    yield config
    for name in TEXT_CONFIGS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield part
        elif is_dataclass(part):
            yield vars(part)


def context_length(key: str, config: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states; otherwise FALLBACK_CONTEXT, with a warning in the log."""
    for part in text_configs(config):
        for name in CONTEXT_KEYS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK_CONTEXT)
    return FALLBACK_CONTEXT


def attention_heads(config: Mapping[str, Any]) -> int:
    """Number of query heads in a config.json, or in mlx-lm's arguments of it; 0 if not stated."""
    stated = (part.get("num_attention_heads") for part in text_configs(config))
    return next((int(number) for number in stated if number), 0)


def vocab_size(config: Mapping[str, Any]) -> int:
    """Size of the vocabulary that a config.json states, which may be padded; 0 if not stated."""
    stated = (part.get("vocab_size") for part in text_configs(config))
    return next((number for number in stated if type(number) is int and number > 0), 0)
