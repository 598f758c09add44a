"""Multi-token prediction (MTP): a head that the makers have trained with a model, which predicts the token after next.

DeepSeek-V3 (arXiv:2412.19437, section 2.2), and GLM-4.5 and MiMo likewise: behind token t of a sequence, whose hidden
state the model has, the embedding of token t + 1 and that hidden state, each normalised, are projected to one vector;
one more layer of the model's own kind and a norm make a hidden state of it, of which the model's own head makes the
logits of token t + 2. That hidden state, with the embedding of that token, predicts the one behind it in the same way.

mlx-lm leaves the weights of such heads out. Here a model keeps its own as a part of it: its KV cache has two more
layers, that of the head, in which token t + 1 has the place t + 1, and the hidden states themselves
(kv_cache/hidden_states.py). So both are there for every token that the model has computed, wherever its KV cache goes.

Rule: a head is never the reason that a model can't be loaded. One that is incomplete, or otherwise unlike what is
      expected, is left out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3, glm4_moe, glm4_moe_lite, mimo
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import one_line
from mlxserver.engine.kv_cache import hidden_states
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.loading.metadata import place_in_head, states_head
from mlxserver.engine.loading.weight_names import model_classes
from mlxserver.engine.platform.policy import ExecutionPolicy

log = logging.getLogger("engine")

ModelClasses = tuple[type[nn.Module], type[Any]]

LAYERS = 2  # of the KV cache: the head's own, and the hidden states
_HEAD = "mtp"  # the name of the head in the model
_QUANTIZED_PARTS = ("scales", "biases", "global_scale")
_SHARED = ("embed_tokens.", "shared_head.head.")  # copies of the model's own


@dataclass(frozen=True, eq=False)
class Layout:
    """What a kind of model's heads consist of. make_layer: the layer of one, from the model's arguments. names: of what
    else it has, in a checkpoint and here. is_hidden_first: of the two vectors that are projected.
    """

    make_layer: Callable[[Any], nn.Module]
    names: Mapping[str, str]
    is_hidden_first: bool = False


_NAMES = {"enorm": "embedding_norm", "hnorm": "hidden_norm", "eh_proj": "projection", "shared_head.norm": "norm"}
_MIMO_NAMES = {
    "token_layernorm": "embedding_norm",
    "hidden_layernorm": "hidden_norm",
    "input_proj": "projection",
    "final_layernorm": "norm",
}
LAYOUTS = {  # by the class of the model
    deepseek_v3.Model: Layout(lambda args: deepseek_v3.DeepseekV3DecoderLayer(args, args.num_hidden_layers), _NAMES),
    glm4_moe.Model: Layout(lambda args: glm4_moe.DecoderLayer(args, args.num_hidden_layers), _NAMES),
    glm4_moe_lite.Model: Layout(
        lambda args: glm4_moe_lite.Glm4MoeLiteDecoderLayer(args, args.num_hidden_layers), _NAMES
    ),
    mimo.Model: Layout(mimo.TransformerBlock, _MIMO_NAMES, is_hidden_first=True),
}


class Head(nn.Module):  # type: ignore[misc]
    """A head: two norms, a projection, a layer, a norm. args: of the model, as mlx-lm has them."""

    def __init__(self, args: Any, layout: Layout) -> None:
        super().__init__()
        self._is_hidden_first = layout.is_hidden_first
        dim = args.hidden_size
        self.embedding_norm = nn.RMSNorm(dim, eps=args.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(dim, eps=args.rms_norm_eps)
        self.projection = nn.Linear(2 * dim, dim, bias=False)
        self.layer = layout.make_layer(args)
        self.norm = nn.RMSNorm(dim, eps=args.rms_norm_eps)

    def __call__(self, embeddings: mx.array, hidden: mx.array, mask: Any, cache: Any) -> mx.array:
        """Hidden states behind tokens. embeddings: of the tokens; hidden: of those before them; [rows, tokens, dim]."""
        both = [self.embedding_norm(embeddings), self.hidden_norm(hidden)]
        projected = self.projection(mx.concatenate(both[::-1] if self._is_hidden_first else both, axis=-1))
        return cast(mx.array, self.norm(self.layer(projected, mask, cache)))


def is_wanted(spec: ModelSpec, policy: ExecutionPolicy) -> bool:
    """Whether a model of these settings would draft with its head."""
    others = spec.shard or spec.draft or spec.kv_bits  # quantised hidden states would say less
    return spec.mtp and not others and policy.batch_cache == "slots" and policy.may_speculate(spec.speculation)


def has_head(model: Any) -> bool:
    """Whether a model has its head."""
    return _HEAD in model if isinstance(model, nn.Module) else False


def drop_head(model: Any) -> None:
    """Have a model without its head, if it has one, and without the KV cache of it."""
    if has_head(model):
        del model[_HEAD]


def head_bytes(model: Any) -> int:
    """Bytes of the weights that a pass of a model's head reads: its own, and those that make logits."""
    modules = (model[_HEAD], model.lm_head if "lm_head" in model else model.model.embed_tokens)
    return sum(array.nbytes for module in modules for _, array in tree_flatten(module.parameters()))


def predict(model: Any, tokens: mx.array, hidden: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
    """The likeliest tokens behind others, [rows], and the hidden states behind these, [rows, 1, dim].

    tokens: [rows]; hidden: the states before them, [rows, 1, dim]; cache: of the head's layer.
    """
    embeddings = model.model.embed_tokens(tokens[:, None])
    behind = model[_HEAD](embeddings, hidden, cache.make_mask(1), cache)
    return mx.argmax(_logits(model, behind)[:, -1], axis=-1).astype(mx.uint32), behind


def _logits(model: Any, hidden: mx.array) -> mx.array:
    return cast(mx.array, model.lm_head(hidden) if "lm_head" in model else model.model.embed_tokens.as_linear(hidden))


def classes_with_head(config: dict[str, Any]) -> ModelClasses:
    """The classes of a model and its arguments, as mlx-lm's load_model() takes them; with its head where one is
    described, and of a kind that is known.
    """
    return _classes(config, is_kept=True)


def classes_without_head(config: dict[str, Any]) -> ModelClasses:
    """The classes of a model that leaves its head in the checkpoint."""
    return _classes(config, is_kept=False)  # mlx-lm's own does so for models of some numbers of layers


def _classes(config: dict[str, Any], *, is_kept: bool) -> ModelClasses:
    model_class: Any
    model_class, arguments = model_classes(config)
    layout = next((own for base, own in LAYOUTS.items() if issubclass(model_class, base)), None)
    if layout is None or not states_head(config):
        return model_class, arguments
    return _with_head(model_class, layout, is_kept), arguments


@functools.cache
def _with_head(model_class: type[nn.Module], layout: Layout, is_kept: bool) -> type[nn.Module]:
    """A subclass that keeps its head, or leaves it out."""
    base: Any = model_class

    class WithHead(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if is_kept:
                self[_HEAD] = Head(args, layout)

        def make_cache(self) -> Cache:
            return [KVCache() for _ in range(len(self.layers) + (LAYERS if has_head(self) else 0))]

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            if cache is None or not has_head(self):
                return cast(mx.array, super().__call__(inputs, cache))
            hidden = self.model(inputs, cache[:-LAYERS])
            _follow(self, inputs, hidden, *cache[-LAYERS:])
            # Or else a step would leave to later ones what its logits do not need, with all that it is computed from.
            written = [array for layer in cache[-LAYERS:] for array in hidden_states.arrays(layer)]
            (hidden,) = mx.depends([hidden], written)
            return _logits(self, hidden)

        def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
            sanitize: Any = super().sanitize
            own, of_head = _divided(weights, self.args.num_hidden_layers)
            sanitized: dict[str, mx.array] = sanitize(own)
            if has_head(self):
                sanitized |= _fitting(self, lambda: _head_weights(sanitize, of_head, layout.names))
            return sanitized

    WithHead.__module__, WithHead.__qualname__ = model_class.__module__, model_class.__qualname__
    WithHead.__name__ = model_class.__name__
    return WithHead


def _follow(model: Any, tokens: mx.array, hidden: mx.array, own: Any, states: Any) -> None:
    """Have a head's KV cache and the hidden states follow those of the model, [rows, tokens, dim].

    Of the head, only keys and values are computed: nothing needs what else is described here.
    """
    before = mx.concatenate([hidden_states.append(states, hidden), hidden[:, :-1]], axis=1)
    embeddings = model.model.embed_tokens(tokens)
    mask = create_attention_mask(embeddings, own, return_array=True)
    model[_HEAD](embeddings, before, mask, own)


def _divided(weights: Mapping[str, mx.array], num_layers: int) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """A checkpoint's weights without those of heads, and those of the first head by their names in it."""
    own, of_head = {}, {}
    for name, array in weights.items():
        if (place := place_in_head(name, num_layers)) is None:
            own[name] = array
        elif place[0] == 0 and not place[1].startswith(_SHARED):
            of_head[place[1]] = array
    return own, of_head


def _head_weights(sanitize: Any, weights: Mapping[str, mx.array], names: Mapping[str, str]) -> dict[str, mx.array]:
    """The weights of a head by their names in the model. sanitize: the model's own, which knows its layers. names: as
    those of a Layout.
    """
    prefix = "model.layers.0."
    named = {}
    for name, array in sanitize({prefix + name: array for name, array in weights.items()}).items():
        inner = name.removeprefix(prefix)
        layer, _, kind = inner.rpartition(".")
        named[f"{_HEAD}.{names[layer]}.{kind}" if layer in names else f"{_HEAD}.layer.{inner}"] = array
    return named


def _fitting(model: Any, read: Callable[[], Mapping[str, mx.array]]) -> Mapping[str, mx.array]:
    """The weights of a head, if they are what the model's head expects; else none, and the model loses its head."""
    expected = {f"{_HEAD}.{name}": array.shape for name, array in tree_flatten(model[_HEAD].parameters())}
    weights: Mapping[str, mx.array] = {}
    try:
        weights = read()
        problem = _problem(weights, expected) if weights else "it is not in the checkpoint"
    except Exception as error:  # of any kind: it is foreign code, given what it may not know
        problem = one_line(error)
    if problem:
        log.debug("no multi-token prediction head: %s", problem)
        drop_head(model)
        return {}
    return weights


def _problem(weights: Mapping[str, mx.array], expected: Mapping[str, Sequence[int]]) -> str | None:
    """What is wrong with the weights of a head; None if nothing is."""
    for name, shape in expected.items():
        if name not in weights:
            return f"{name} is missing"
        is_quantized = f"{name.removesuffix('.weight')}.scales" in weights
        if not is_quantized and tuple(weights[name].shape) != tuple(shape):
            return f"{name} has the shape {list(weights[name].shape)}; expected {list(shape)}"
    quantized = {f"{name.removesuffix('.weight')}.{part}" for name in expected for part in _QUANTIZED_PARTS}
    others = [name for name in weights if name not in expected and name not in quantized]
    return f"{others[0]} is not expected" if others else None
