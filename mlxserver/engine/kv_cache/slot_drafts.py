"""Drafts of the sequences in slots, by a head of their model (loading/mtp.py): its passes over its own layer alone.

What they write lies behind the tokens of each slot, where the verifying step writes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import hidden_states
from mlxserver.engine.kv_cache.quantized import arrays_of
from mlxserver.engine.kv_cache.ragged import ragged_layers
from mlxserver.engine.kv_cache.slot_class import SlotClass
from mlxserver.engine.kv_cache.slots import SlotLayer, StepPositions

# Tokens [rows], hidden states before them, [rows, 1, dim], and the cache of the head's layer -> likeliest tokens behind
# them, [rows], and hidden states.
Predict = Callable[[mx.array, mx.array, Any], tuple[mx.array, mx.array]]
_OWN, _STATES = -2, -1  # layers of the KV cache: the head's own, and the hidden states


class _HeadLayer(SlotLayer):
    """Cache of a head's layer, without the first place: no hidden state is before the first token."""

    is_causal = False

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """As SlotLayer's; a first token attends to itself all the same, since its row has nothing else."""
        is_behind = mx.arange(self._step.visible) > 0
        mask = super().make_mask(N, return_array, window_size)
        return mask & (is_behind | (self.offset == 0)[:, None, None, None])


def draft(
    tokens: mx.array,
    classes: Sequence[SlotClass],
    steps: Sequence[Sequence[StepPositions]],
    predict: Predict,
    *,
    is_ragged: bool,
) -> mx.array:
    """The next tokens of each row, [rows, steps]. tokens: [rows], not computed yet. steps: each with its positions in
    every class. is_ragged: the head can have all classes in one pass.
    """
    if is_ragged:
        return _draft(tokens, classes, steps, predict)
    start, parts = 0, []
    for n, slot_class in enumerate(classes):
        end = start + steps[0][n].batch
        parts.append(_draft(tokens[start:end], [slot_class], [[step[n]] for step in steps], predict))
        start = end
    return mx.concatenate(parts)


def _draft(
    tokens: mx.array, classes: Sequence[SlotClass], steps: Sequence[Sequence[StepPositions]], predict: Predict
) -> mx.array:
    hidden = mx.concatenate(
        [
            hidden_states.last_of_slots(SlotLayer(own.keys[_STATES], own.values[_STATES], step))
            for own, step in zip(classes, steps[0], strict=True)
        ]
    )
    drafted = []
    for step in steps:
        layers = [_HeadLayer(own.keys[_OWN], own.values[_OWN], at) for own, at in zip(classes, step, strict=True)]
        cache = layers[0] if len(layers) == 1 else ragged_layers([[layer] for layer in layers])[0]
        tokens, hidden = predict(tokens, hidden, cache)
        for slot_class, layer in zip(classes, layers, strict=True):
            (slot_class.keys[_OWN],), (slot_class.values[_OWN],) = arrays_of(layer.keys), arrays_of(layer.values)
        drafted.append(tokens)
    return mx.stack(drafted, axis=1)
