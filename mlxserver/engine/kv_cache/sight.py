"""Sight of a model: what its layers are given beside token ids during one forward pass.

A model that sees has layers (loading/sight_layers.py) that read it. Outside of showing() it is empty, and the model is
the text model that it was.

Rule: used on the engine thread, which makes one forward pass at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

from mlxserver.engine.mlx import mx


class Sight:
    """What a forward pass is given.

    at, features: where image tokens stand in the pass, [n] of int, and what they are in place of their embeddings,
    [n, dim]. added: likewise, what is added to them behind the first layers, one [n, dim] per layer. positions: for
    rotary embeddings, [3, tokens]: time, row, column. shift: [rows], added to the offsets for rotary embeddings.
    blocks: [tokens], the number of the image that each token is of, -1 for none. rows: in a decode step, the rows whose
    token is of an image, [rows] of bool; then features and what is added are [rows, dim], and positions [3, rows].
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
        self.rows: mx.array | None = None
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
        rows: mx.array | None = None,
    ) -> Iterator[None]:
        """Give this to the forward pass inside the block."""
        self.blocks, self.rows = blocks, rows
        self.at, self.features, self.added, self.positions, self.shift = at, features, added, positions, shift
        try:
            yield
        finally:
            self._clear()

    def replaced(self, x: mx.array, values: mx.array) -> mx.array:
        """x, [rows, tokens, ...], with these values at the image tokens."""
        values = values.astype(x.dtype)
        if self.rows is not None:
            return mx.where(self.rows.reshape(-1, *[1] * (x.ndim - 1)), values[:, None], x)
        x[:, self.at] = values
        return x

    def plus(self, x: mx.array, values: mx.array) -> mx.array:
        """x, [rows, tokens, dim], with these values added at the image tokens."""
        values = values.astype(x.dtype)
        if self.rows is not None:
            return x + values[:, None]
        x[:, self.at] = x[:, self.at] + values
        return x


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of a decode step. offset: of its token in the sequence. shift: of its position, as Sight.shift. showing: a
    block in which the model's sight is that of its token.
    """

    offset: int
    shift: int = 0
    showing: AbstractContextManager[None] = field(default_factory=nullcontext)


def step_sights(sight: Sight, rows: Sequence[StepRow]) -> list[mx.array]:
    """What the rows of a decode step are given, one array per row in each: none; or the shifts, [rows]; or, where a
    row's token is of an image, the shifts, whether it is, the features, [rows, dim], the positions, [rows, 3], and what
    is added behind each of the first layers, [rows, dim].
    """
    positions = [[row.offset + row.shift] * 3 for row in rows]
    features: dict[int, Sequence[mx.array]] = {}
    for n, row in enumerate(rows):
        with row.showing:
            if sight.features is not None:
                features[n] = [own[0] for own in (sight.features, *sight.added)]
                if sight.positions is not None:
                    positions[n] = cast(list[int], sight.positions[:, 0].tolist())
    shifts = mx.array([row.shift for row in rows], dtype=mx.int32)
    if not features:
        return [shifts] if any(row.shift for row in rows) else []
    nothing = [mx.zeros_like(own) for own in next(iter(features.values()))]
    of_rows = [features.get(n, nothing) for n in range(len(rows))]
    seen, *added = [mx.stack(list(own)) for own in zip(*of_rows, strict=True)]
    return [shifts, mx.array([n in features for n in range(len(rows))]), seen, mx.array(positions), *added]


def step_logits(model: Any, tokens: mx.array, cache: Sequence[Any], sights: Sequence[mx.array]) -> mx.array:
    """Logits of a decode step, [rows, n] -> [rows, n, vocab]. sights: of step_sights()."""
    if not sights:
        return cast(mx.array, model(tokens, cache=cache))
    given: dict[str, Any] = {"shift": sights[0]}
    if len(sights) > 1:
        _, rows, features, positions, *added = sights
        given |= {"rows": rows, "features": features, "positions": positions.T, "added": added}
    with model.sight.showing(**given):
        return cast(mx.array, model(tokens, cache=cache))
