"""What a prompt's attention takes on a CPU, where its scores are written out, and how long a chunk may be for that.

Rule: a chunk is held to what was counted for the model before it was loaded (loading/estimate.py). Sizes are bytes.
"""

from __future__ import annotations

import math

from mlxserver.engine.platform import device

# MLX's CPU backend runs up to two hundred operations ahead, some four layers. Their results are all there at once.
LAYERS_AHEAD = 4
_COPIES = 2  # the scores, and their exponentials
_MOST = 128 << 20  # for all scores that are there at once; a chunk has at least SMALLEST_CHUNK tokens even so
# Tokens in a chunk, on every device: never fewer, so that a slow machine gets on; never more, so that a fast one stays
# responsive.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 4096


def score_bytes(heads: int, chunk: int, length: int) -> int:
    """What the attention of a chunk of so many tokens takes, when the last of them looks at `length`."""
    return LAYERS_AHEAD * _COPIES * 4 * heads * chunk * length if device.is_cpu() else 0


def fitting(heads: int, wanted: int, done: int) -> int:
    """Tokens of a chunk behind `done` others: those wanted, or as many as have small enough scores."""
    if not (one := score_bytes(heads, 1, 1)):
        return wanted
    longest = (math.isqrt(done * done + 4 * (_MOST // one)) - done) // 2  # chunk * (done + chunk) scores
    return min(wanted, max(longest, SMALLEST_CHUNK))


def most_bytes(heads: int, context: int) -> int:
    """What the scores of any chunk take at most, when no prompt is longer than the context."""
    longest = fitting(heads, LARGEST_CHUNK, 0)
    fitted = min(_MOST, score_bytes(heads, longest, context))
    return max(fitted, score_bytes(heads, SMALLEST_CHUNK, context))
