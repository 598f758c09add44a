"""Hidden states of tokens, behind a model's last norm, kept as keys and values: half of each in a cache of one head.

A head that predicts more tokens (loading/mtp.py) begins with the hidden state of the token before. In a layer of the
KV cache the states follow their tokens wherever those go, into slots, prefixes and files, and leave with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache.ragged import RaggedLayer
from mlxserver.engine.kv_cache.slots import SlotLayer


def append(layer: Any, hidden: mx.array) -> mx.array:
    """Keep the hidden states of tokens, [rows, tokens, dim], in a layer's cache; dim is even.

    Returns that of the token before them in each row, [rows, 1, dim]; zeros where there is none. It is read from what
    has been written: MLX copies an array that is written to while it may still be read.
    """
    layer.update_and_fetch(*mx.split(hidden[:, None], 2, axis=-1))
    if isinstance(layer, RaggedLayer | SlotLayer):
        return mx.concatenate([last_of_slots(own) for own in layer.classes])
    tokens = hidden.shape[1]
    end = getattr(layer, "_idx", layer.offset) - tokens  # a batched cache has its rows end together
    if not end:
        return mx.zeros((hidden.shape[0], 1, hidden.shape[2]), hidden.dtype)
    found = mx.concatenate([layer.keys[:, 0, end - 1 : end], layer.values[:, 0, end - 1 : end]], axis=-1)
    return _but_for_none(found, mx.array(layer.offset).reshape(-1) - tokens)


def arrays(layer: Any) -> list[mx.array]:
    """The arrays of a layer's cache."""
    classes: Sequence[Any] = layer.classes if isinstance(layer, RaggedLayer) else [layer]
    return [array for own in classes for array in (own.keys, own.values)]


def last_of_slots(layer: SlotLayer) -> mx.array:
    """The hidden state before each computed slot's offset, [batch, 1, dim]; zeros where there is none."""
    offset = layer.offset
    rows = mx.arange(offset.shape[0])
    at = mx.maximum(offset - 1, 0)
    halves: list[Any] = [layer.keys, layer.values]
    found = mx.concatenate([half[rows, 0, at] for half in halves], axis=-1)
    return _but_for_none(found[:, None], offset)


def _but_for_none(hidden: mx.array, offset: mx.array) -> mx.array:
    """Hidden states, [rows, 1, dim], with zeros in rows without a token."""
    return mx.where(offset[:, None, None] > 0, hidden, mx.zeros((), hidden.dtype))
