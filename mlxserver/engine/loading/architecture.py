"""Architecture of a model in numbers, as mlx-lm builds it from its config.json with arrays that are never evaluated.

One lazy forward step shows the shapes of its cache, so every architecture that can be loaded can be inspected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.loading import mtp
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.loading.metadata import model_arguments
from mlxserver.engine.loading.weight_names import model_classes
from mlxserver.engine.platform import cpu_layers
from mlxserver.engine.platform.cpu_stored import values_in_layers
from mlxserver.engine.platform.policy import current


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of an architecture, in numbers of values rather than bytes.

    layers: values per token of each layer with a KV cache, and the most tokens that it keeps per sequence (0: all).
    sequence_values: state of a sequence, whatever its length. width: activations per token in the widest layer.
    arguments: those that mlx-lm's model was made with (metadata.model_arguments()). has_experts: some of its layers
    choose among experts. in_layers: weights that are those of linear and embedding layers and of experts.
    """

    weights: int
    layers: tuple[tuple[int, int], ...]
    sequence_values: int
    width: int
    vocab: int
    arguments: tuple[Mapping[str, Any], ...] = ()
    has_experts: bool = False
    in_layers: int = 0

    def cache_values(self, tokens: int, sequences: int) -> int:
        """Values in a full cache of so many tokens and sequences."""
        return sequences * self.sequence_values + sum(
            values * (min(tokens, sequences * window) if window else tokens) for values, window in self.layers
        )

    def cache_bytes(self, tokens: int, sequences: int, value_bytes: int, kv: KVFormat | None) -> int:
        """Bytes of a full cache. Where keys and values are quantised, no layer has a window."""
        states = sequences * self.sequence_values
        kept = self.cache_values(tokens, sequences) - states
        return states * value_bytes + int(kept * (kv.bytes_per_value(value_bytes) if kv else value_bytes))

    @property
    def widest_layer(self) -> int:
        """Most values per token of a layer's KV cache."""
        return max((values for values, _ in self.layers), default=0)


def inspect_architecture(
    config: Mapping[str, Any], kv: KVFormat | None = None, *, with_head: bool = False
) -> Architecture:
    """The architecture that a config.json describes. Raises whatever mlx-lm does for a wrong one.

    kv: quantised keys and values, in which the model is to keep them; Unsupported is raised if it can't. with_head: it
    has the head that it describes, which predicts more tokens (mtp.py).
    """
    model_class, arguments = mtp.classes_with_head(dict(config)) if with_head else model_classes(dict(config))
    if current().replace_kernels:
        cpu_layers.replace_functions()
    model = model_class(arguments.from_dict(dict(config)))
    quantize_kv(model, kv)  # whose cache has the same values
    cache = make_prompt_cache(model)
    logits = model(mx.zeros((1, 1), dtype=mx.uint32), cache=cache)
    parameters = [array for _, array in tree_flatten(model.parameters())]
    vocab = int(logits.shape[-1])
    outputs = sum(array.shape[-2] for array in parameters if array.ndim >= 2 and array.shape[-2] != vocab)
    layers, sequence_values = _cache_values(model, list(caches.flat(cache)))
    mx.random.seed(0)  # or else the weights, which are never computed, would stay in this thread's random state
    return Architecture(
        sum(array.size for array in parameters),
        layers,
        sequence_values,
        outputs // (len(cache) - mtp.has_head(model)),  # hidden states are no layer that computes
        vocab,
        tuple(model_arguments(model)),
        any(isinstance(layer, SwitchLinear) for layer in model.modules()),
        values_in_layers(model),
    )


def _cache_values(model: Any, layers: Sequence[Any]) -> tuple[tuple[tuple[int, int], ...], int]:
    """The layers and the state of an Architecture. layers: the caches of a sequence of one token."""
    kept, state = [], 0
    grown: Sequence[tuple[int, int]] | None = None
    for n, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            per_token = keys.size // keys.shape[2] + values.size // values.shape[2]
            kept.append((per_token, _window(layer)))
        elif isinstance(layer, ArraysCache):
            state += _size(layer)
        else:
            grown = grown or _measured_growth(model)
            kept.append((grown[n][0], 0))
            state += grown[n][1]
    return tuple(kept), state


def _measured_growth(model: Any) -> list[tuple[int, int]]:
    """Values per token, and of the rest, of each layer's cache, whatever it is: from two lengths beyond any window."""
    lengths, sizes = (4096, 8192), []
    for length in lengths:
        cache = make_prompt_cache(model)
        model(mx.zeros((1, length), dtype=mx.uint32), cache=cache)
        sizes.append([_size(layer) for layer in caches.flat(cache)])
    per_token = [-(-(long - short) // (lengths[1] - lengths[0])) for short, long in zip(*sizes, strict=True)]
    return [(own, max(0, short - own * lengths[0])) for own, short in zip(per_token, sizes[0], strict=True)]


def _window(layer: Any) -> int:
    """The most tokens that a layer keeps; 0: all. A chunk's cache goes beyond it by the block that it grows by."""
    if chunk := int(getattr(layer, "chunk_size", None) or 0):
        return chunk + int(layer.step)
    return int(getattr(layer, "max_size", None) or 0)


def _size(layer: Any) -> int:
    """Number of values in a layer's cache."""
    return sum(array.size for _, array in tree_flatten(layer.state) if isinstance(array, mx.array))
