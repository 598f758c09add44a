"""The length of a model's context, found in its config.json."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

log = logging.getLogger("engine")

FALLBACK = 4096  # tokens
KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


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
    """The context in tokens that a config.json states; FALLBACK, and a line in the log, if none."""
    for part in text_configs(config):
        for name in KEYS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK)
    return FALLBACK
