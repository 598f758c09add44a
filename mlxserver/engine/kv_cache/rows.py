"""Rows of a forward pass: sequences stand in it by class, and in the batch in their own order."""

from __future__ import annotations

from collections.abc import Sequence

from mlxserver.engine.mlx import mx


class Rows:
    """Permutation between sequences and rows. rows: index of the sequence in each row, None in one of no sequence."""

    def __init__(self, rows: Sequence[int | None]) -> None:
        row_of = {member: row for row, member in enumerate(rows) if member is not None}
        order = [row_of[member] for member in range(len(row_of))]
        in_order = list(range(len(order)))
        self._members = None if rows == in_order else mx.array([member or 0 for member in rows], dtype=mx.uint32)
        self._order = slice(len(order)) if order == in_order else mx.array(order, dtype=mx.uint32)

    def arrange(self, inputs: mx.array) -> mx.array:
        """Inputs of the sequences, [batch, ...] -> of the rows, [rows, ...]."""
        return inputs if self._members is None else inputs[self._members]

    def restore(self, logits: mx.array) -> mx.array:
        """Logits of the rows, [rows, ...] -> of the sequences, [batch, ...]."""
        return logits[self._order]
