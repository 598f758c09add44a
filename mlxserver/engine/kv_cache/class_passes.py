"""Forward passes of a step over several capacity classes: one for all rows, or one per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache.ragged import ragged_layers
from mlxserver.engine.kv_cache.sight import step_logits
from mlxserver.engine.kv_cache.slots import SlotLayer


@dataclass(frozen=True, slots=True)
class ClassPasses:
    """Computes the rows of all classes. is_ragged: the model can have ragged keys. has_kernel, fuses_layers: as
    ragged_layers() has them.
    """

    model: Any
    is_ragged: bool
    has_kernel: bool
    fuses_layers: bool

    def logits(self, inputs: mx.array, sights: Sequence[mx.array], classes: Sequence[list[SlotLayer]]) -> mx.array:
        """Logits of the rows, [rows, tokens] -> [rows, tokens, vocab]. classes: the caches of all layers, each."""
        if self.is_ragged and (len(classes) > 1 or self.has_kernel or self.fuses_layers):
            layers = ragged_layers(classes, self.has_kernel, self.fuses_layers)
            return step_logits(self.model, inputs, layers, sights)
        if len(classes) == 1:
            return step_logits(self.model, inputs, classes[0], sights)
        start, parts = 0, []
        for own_layers in classes:
            end = start + own_layers[0].offset.shape[0]
            own_sights = [own[start:end] for own in sights]
            parts.append(step_logits(self.model, inputs[start:end], own_layers, own_sights))
            start = end
        return mx.concatenate(parts)
