"""Log-probabilities of chosen tokens, computed for the rows that ask and for no other.

They are those of the model itself: before penalties, bias, temperature and filters.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.sequence import Logprobs, Sequence


@dataclass(frozen=True)
class MeasuredLogprobs:
    """Those of one step, on their way from the device. `arrays`: chosen [n], top ids [n, k] and their values [n, k]."""

    rows: tuple[Sequence, ...] = ()
    arrays: list[mx.array] = field(default_factory=list)

    def read(self) -> dict[int, Logprobs]:
        """By row id; waits for the device."""
        if not self.rows:
            return {}
        chosen, ids, values = (array.tolist() for array in self.arrays)
        read = {}
        for row, own, top_ids, top_values in zip(
            self.rows,
            cast(list[float], chosen),
            cast(list[list[int]], ids),
            cast(list[list[float]], values),
            strict=True,
        ):
            likeliest = sorted(zip(top_ids, top_values, strict=True), key=lambda pair: -pair[1])
            read[row.id] = Logprobs(own, tuple(likeliest[: row.top_logprobs]))
        return read


def measure(rows: abc.Sequence[Sequence], logits: mx.array, tokens: mx.array) -> MeasuredLogprobs:
    """Those of the chosen tokens: logits [rows, vocab], tokens [rows]. Nothing is evaluated."""
    asking = [index for index, row in enumerate(rows) if row.top_logprobs is not None]
    if not asking:
        return MeasuredLogprobs()
    indices = mx.array(asking, dtype=mx.uint32)
    own = logits[indices].astype(mx.float32)
    own = own - mx.logsumexp(own, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(own, tokens[indices][:, None], axis=-1)[:, 0]
    most = max(rows[index].top_logprobs or 0 for index in asking)
    ids = mx.argpartition(-own, kth=max(most - 1, 0), axis=-1)[:, :most]
    return MeasuredLogprobs(
        tuple(rows[index] for index in asking), [chosen, ids, mx.take_along_axis(own, ids, axis=-1)]
    )
