"""Batched KV caches of models with other layers than plain ones (sliding windows, recurrent states): mlx-lm's own.

mlx-lm's batched keys and values are as long as the longest sequence. Sequences of very different lengths therefore have
batches of their own, with a forward pass each: few and wide classes, as every one reads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.classes import ClassOf, grouped, one_class, wide_classes
from mlxserver.engine.kv_cache.rows import Rows
from mlxserver.engine.kv_cache.sight import step_logits


@dataclass
class _Class:
    """Sequences of one class: mlx-lm's batched cache, and the sequence of each of its rows."""

    cache: caches.Cache = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    def add(self, members: Sequence[int], joining: Sequence[caches.Cache]) -> None:
        merged = caches.merge(joining)
        for layer, other in zip(self.cache, merged, strict=bool(self.cache)):
            layer.extend(other)
        self.cache = self.cache or merged
        self.members += members

    def keep(self, order: Sequence[int]) -> None:
        """Keep the members of this order that are here, under their index in it."""
        row_of = {member: row for row, member in enumerate(self.members)}
        rows = [row_of[member] for member in order if member in row_of]
        self.members = [new for new, member in enumerate(order) if member in row_of]
        if rows and rows != list(range(len(row_of))):
            for layer in self.cache:
                layer.filter(rows)


class MergedCache:
    """BatchCache of any cache that mlx-lm can batch. wide: None chooses the classes by the sizes of the model."""

    def __init__(self, model: Any, wide: ClassOf | None = None) -> None:
        self._model = model
        # Windows and states are bounded: without keys that grow with the sequence, a pass more would save nothing.
        grows = any(isinstance(layer, KVCache | QuantizedKVCache) for layer in caches.flat(caches.new_cache(model)))
        self._class_of: ClassOf = (wide or wide_classes(caches.pass_tokens(model))) if grows else one_class
        self.clear()

    def clear(self) -> None:
        """Drop all sequences."""
        self._classes: dict[int, _Class] = {}
        self._lengths: list[int] = []
        self._set_rows()

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences behind the present ones."""
        first = len(self._lengths)
        self._lengths += map(caches.length, joining)
        self._add({first + number: cache for number, cache in enumerate(joining)})

    def _add(self, joining: dict[int, caches.Cache]) -> None:
        """Add sequences by their index to the classes of their lengths."""
        for name, members in grouped(joining, lambda member: self._class_of(self._lengths[member] + 1)).items():
            self._classes.setdefault(name, _Class()).add(members, [joining[member] for member in members])
        self._set_rows()

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._lengths = [self._lengths[index] for index in order]
        for batch in self._classes.values():
            batch.keep(order)
        self._set_rows()

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's cache."""
        batch = next(batch for batch in self._classes.values() if index in batch.members)
        return caches.extract(batch.cache, batch.members.index(index))

    def advance(self, inputs: mx.array, sights: Sequence[mx.array] = ()) -> mx.array:
        """Compute one token per sequence."""
        self._move_outgrown()
        inputs, sights = self._rows.arrange(inputs), [self._rows.arrange(own) for own in sights]
        parts, start = [], 0
        for batch in self._classes.values():
            end = start + len(batch.members)
            own_sights = [own[start:end] for own in sights]
            parts.append(step_logits(self._model, inputs[start:end, None], batch.cache, own_sights)[:, -1, :])
            start = end
        logits: mx.array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        self._lengths = [length + 1 for length in self._lengths]
        return self._rows.restore(logits)

    def _move_outgrown(self) -> None:
        """Move sequences that outgrew their class to the next one, each by itself."""
        for name, batch in list(self._classes.items()):
            moving = [member for member in batch.members if self._class_of(self._lengths[member] + 1) > name]
            if moving:
                caches_of = {member: self.extract(member) for member in moving}
                gone = set(moving)
                staying = [row for row, member in enumerate(batch.members) if member not in gone]
                batch.members = [batch.members[row] for row in staying]
                if staying:
                    for layer in batch.cache:
                        layer.filter(staying)
                self._add(caches_of)

    def tokens_for(self, lengths: Sequence[int]) -> int:
        """Tokens of KV cache of such sequences."""
        return sum(len(own) * max(own) for own in grouped(lengths, self._class_of).values())

    def tokens_alone(self, length: int) -> int:
        """Its own tokens."""
        return length

    def compact(self) -> None:
        """Nothing to do: mlx-lm's caches keep no more than their longest sequence needs."""

    def _set_rows(self) -> None:
        """Drop empty classes, and set the rows: those of each class."""
        self._classes = {name: batch for name, batch in sorted(self._classes.items()) if batch.members}
        self._rows = Rows([member for batch in self._classes.values() for member in batch.members])
