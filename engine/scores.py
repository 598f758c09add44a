"""What a prompt's attention takes on a CPU, where its scores are written out, and how long a chunk may be for that.

Rule: a chunk is held to what was counted for the model before it was loaded (engine/memory.py). Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine import device

# MLX's CPU backend runs up to two hundred operations ahead, some four layers. Their results are all there at once.
LAYERS_AHEAD = 4
_COPIES = 2  # the scores, and their exponentials
_MOST = 128 << 20  # for all scores that are there at once; a chunk has at least _SMALLEST tokens even so
_SMALLEST, _LARGEST = 16, 4096


def heads(config: Mapping[str, Any]) -> int:
    """Attention heads of the architecture that a config.json describes; 0 if it does not say."""
    return int(config.get("num_attention_heads") or (config.get("text_config") or {}).get("num_attention_heads") or 0)


def score_bytes(heads: int, chunk: int, length: int) -> int:
    """What the attention of a chunk of so many tokens takes, when the last of them looks at `length`."""
    return LAYERS_AHEAD * _COPIES * 4 * heads * chunk * length if device.is_cpu() else 0


def fitting(heads: int, wanted: int, length: int) -> int:
    """Tokens of a chunk that looks at `length`: those wanted, halved until their scores are small enough."""
    chunk = wanted
    while chunk > _SMALLEST and score_bytes(heads, chunk, length) > _MOST:
        chunk //= 2
    return chunk


def longest_chunk(heads: int, length: int) -> int:
    """Tokens of the longest chunk that looks at `length`: a power of two."""
    return fitting(heads, 1 << (min(length, _LARGEST).bit_length() - 1), length)
