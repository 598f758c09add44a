"""Ragged attention: keys and values of several capacity classes in one forward pass.

Everything but the attention of a model computes all rows together; its attention runs per class, so that the time of a
sequence follows the capacity of its own class; or, on CUDA, in one kernel of all classes (platform/cuda_attention.py).
mlx-lm's models pass what a cache returns to scaled_dot_product_attention(). In their modules that name is bound to
attention(), which knows Ragged.

Rule: a Ragged has a dtype, and no operation but being passed to attention(). A model that does anything else with its
      keys, values or mask raises; one whose step can be built computes each class by itself (can_be_ragged()).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.models import base

from mlxserver.engine.kv_cache import attention_shapes, quantized
from mlxserver.engine.kv_cache.quantized import arrays_of
from mlxserver.engine.kv_cache.slots import Layers, SlotLayer, StepPositions, grow, slot_layers
from mlxserver.engine.platform import cpu_attention, cuda_attention
from mlxserver.engine.platform.model_code import rebind

_attention = base.scaled_dot_product_attention


class Ragged:
    """Arrays of the classes' rows, in the order of the rows in the batch.

    offsets: of masks, [rows], where a kernel may do: the first token of each row attends to all before it and itself.
    """

    __slots__ = ("offsets", "parts")

    def __init__(self, parts: Sequence[Any], offsets: mx.array | None = None) -> None:
        self.parts, self.offsets = parts, offsets

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the arrays, which have the same one."""
        return arrays_of(self.parts[0])[-1].dtype


class RaggedLayer:
    """Cache of one layer of all classes during a step, with the interface that mlx-lm's models use.

    classes: cache of this layer per class. offset: [rows], of all classes. ends: row behind each class's last one.
    has_kernel: the attention of all classes may be one kernel. fuses_layers: so may other parts of the layer
    (loading/fused_layers.py).
    """

    def __init__(
        self,
        classes: Sequence[SlotLayer],
        offset: mx.array,
        ends: Sequence[int],
        has_kernel: bool,
        fuses_layers: bool,
    ) -> None:
        self.offset = offset
        self.classes = classes
        self.fuses_layers = fuses_layers
        self._ends, self._has_kernel = ends, has_kernel

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Ragged, Ragged]:
        """Write tokens, [rows, heads, tokens, dim], those of each class to its own slots."""
        parts = zip(self.classes, _split(keys, self._ends), _split(values, self._ends), strict=True)
        fetched = [layer.update_and_fetch(own_keys, own_values) for layer, own_keys, own_values in parts]
        return Ragged([keys for keys, _ in fetched]), Ragged([values for _, values in fetched])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Ragged:
        """Masks of the classes, each [batch, 1, N, visible] of bool."""
        offsets = self.offset if self._has_kernel and window_size is None else None
        return Ragged([layer.make_mask(N, return_array, window_size) for layer in self.classes], offsets)


def ragged_layers(
    classes: Sequence[Sequence[SlotLayer]], has_kernel: bool = False, fuses_layers: bool = False
) -> list[RaggedLayer]:
    """One cache per layer from those of several classes."""
    offsets = [layers[0].offset for layers in classes]
    ends = [0]
    for offset in offsets:
        ends.append(ends[-1] + offset.shape[0])
    offset = mx.concatenate(offsets)  # one object: rotary embeddings of a step are computed once for it
    return [RaggedLayer(layers, offset, ends, has_kernel, fuses_layers) for layers in zip(*classes, strict=True)]


def attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    """As mlx_lm.models.base.scaled_dot_product_attention, for ragged and for quantised keys and values too, and in few
    shapes if asked.

    queries: [rows, heads, tokens, dim].

    Raises:
        TypeError: ragged keys with a mask that is not ragged, or is none.
    """
    if not isinstance(keys, Ragged):
        return _attention_of_class(queries, keys, values, cache, scale, mask, sinks)
    if not (isinstance(values, Ragged) and isinstance(mask, Ragged)):
        raise TypeError("ragged keys need ragged values and a ragged mask")
    is_plain = isinstance(keys.parts[0], mx.array)
    if (
        is_plain
        and mask.offsets is not None
        and sinks is None
        and cuda_attention.supports(queries, keys.parts, values.parts)
    ):
        return cuda_attention.decode_attention(queries, keys.parts, values.parts, mask.offsets, scale)
    ends = [0]
    for part in mask.parts:
        ends.append(ends[-1] + part.shape[0])
    parts = zip(_split(queries, ends), keys.parts, values.parts, mask.parts, strict=True)
    return mx.concatenate([_attention_of_class(q, k, v, None, scale, m, sinks) for q, k, v, m in parts])


def _attention_of_class(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array:
    if isinstance(keys, tuple):
        attended = cpu_attention.of_few_tokens(queries, keys, values, scale, mask) if sinks is None else None
        if attended is not None:
            return attended
        if sinks is None and quantized.can_decode(queries):
            return quantized.decode_attention(queries, keys, values, scale, mask)
        kv = quantized.format_of(queries, keys)
        keys, values, cache = quantized.dequantized(keys, kv), quantized.dequantized(values, kv), None
    return attention_shapes.attention(_attention, queries, keys, values, cache, scale, mask, sinks)


def bind() -> None:
    """Have mlx-lm's model code, as far as it is imported, and what is imported later, call attention()."""
    rebind("scaled_dot_product_attention", _attention, attention)


def can_be_ragged(model: Any, empty: tuple[Layers, Layers]) -> bool:
    """Whether a step of a model can have several classes: one is built, not computed. empty: its layers, no slot."""
    bind()
    classes = []
    for capacity in (1, 2):
        keys, values = ([grow(array, 1, capacity) for array in arrays] for arrays in empty)
        step = StepPositions(mx.zeros((1,), dtype=mx.int32), 1, capacity)
        classes.append(slot_layers(keys, values, step))
    try:
        model(mx.zeros((2, 1), dtype=mx.uint32), cache=ragged_layers(classes))
    except Exception:  # of any kind: it is foreign code, given what it does not know
        return False
    return True


def _split(array: mx.array, ends: Sequence[int]) -> Iterator[mx.array]:
    return (array[start:end] for start, end in pairwise(ends))
