"""The length of a model's context, found in its config.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("engine")

FALLBACK = 4096  # tokens
KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "n_ctx", "seq_length")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def context_length(key: str, config: Mapping[str, Any]) -> int:
    """The context in tokens that a config.json states; FALLBACK, and a line in the log, if none."""
    nested = [config[name] for name in TEXT_CONFIGS if isinstance(config.get(name), dict)]
    for part in (config, *nested):
        for name in KEYS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    log.warning("%s: its config.json states no context length; taking %d tokens", key, FALLBACK)
    return FALLBACK
