"""Sight of a model: what its layers are given beside token ids during one forward pass.

A model that sees has layers (loading/sight_layers.py) that read it. Outside of showing() it is empty, and the model is
the text model that it was.

Rule: used on the engine thread, which makes one forward pass at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from mlxserver.engine.mlx import mx


class Sight:
    """What a forward pass is given.

    at, features: where image tokens stand in the pass, [n] of int, and what they are in place of their embeddings,
    [n, dim]. added: likewise, what is added to them behind the first layers, one [n, dim] per layer. positions: for
    rotary embeddings, [3, tokens]: time, row, column. shift: [rows], added to the offsets for rotary embeddings.
    blocks: [tokens], the number of the image that each token is of, -1 for none.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.at: mx.array | None = None
        self.features: mx.array | None = None
        self.added: Sequence[mx.array] = ()
        self.positions: mx.array | None = None
        self.shift: mx.array | None = None
        self.blocks: mx.array | None = None
        self.angles: dict[tuple[int, float], tuple[mx.array, mx.array]] = {}  # of the positions, once per pass

    @contextmanager
    def showing(
        self,
        *,
        at: mx.array | None = None,
        features: mx.array | None = None,
        added: Sequence[mx.array] = (),
        positions: mx.array | None = None,
        shift: mx.array | None = None,
        blocks: mx.array | None = None,
    ) -> Iterator[None]:
        """Give this to the forward pass inside the block."""
        self.blocks = blocks
        self.at, self.features, self.added, self.positions, self.shift = at, features, added, positions, shift
        try:
            yield
        finally:
            self._clear()


def step_logits(model: Any, tokens: mx.array, cache: Sequence[Any], shifts: Sequence[mx.array]) -> mx.array:
    """Logits of a decode step, [rows, n] -> [rows, n, vocab]. shifts: [rows], or none (Sight.shift)."""
    if not shifts:
        return cast(mx.array, model(tokens, cache=cache))
    with model.sight.showing(shift=shifts[0]):
        return cast(mx.array, model(tokens, cache=cache))
