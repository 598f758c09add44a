"""Layers of a text model that sees: they read its sight (kv_cache/sight.py), and are as before without one.

A layer becomes a subclass of its own class: same parameters, another forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models.base import create_attention_mask

from mlxserver.engine.kv_cache.sight import Sight
from mlxserver.engine.loading.metadata import text_configs

_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte")


def give_sight(model: nn.Module, config: Mapping[str, Any], layers_added: int = 0) -> Sight:
    """Have a text model's layers read a sight, which is `model.sight` from then on.

    config: its config.json. layers_added: number of first layers that features are added behind. Raises ValueError.
    """
    sight = Sight()
    sections, is_interleaved = rope_sections(config)
    modules = dict(model.named_modules())
    embedding = next((module for name, module in modules.items() if name.rpartition(".")[2] in _EMBEDDINGS), None)
    if embedding is None:
        raise ValueError("its text model has no embeddings that images could take the place of")
    ropes = [module for module in modules.values() if isinstance(module, nn.RoPE)] if sections else []
    if sections and not ropes:
        raise ValueError("its rotary embeddings are none that positions in images are known for")
    _become(embedding, _seeing_embedding, sight)
    embedding.feature_scale = _feature_scale(model)
    for name, module in modules.items():
        if name.endswith("embed_tokens_per_layer"):
            _become(module, _blank_embedding, sight)
    if attends_within_images(config):
        _become(next(each for each in modules.values() if hasattr(each, "_make_masks")), _mutual_masks, sight)
    for module in ropes:
        _become(module, _seeing_rope, sight)
        module.axis_of = tuple(_axes(module.dims // 2, sections, is_interleaved))
    for number, layer in enumerate(model.layers[:layers_added]):
        _become(layer, _seeing_layer, sight)
        layer.number = number
    model.sight = sight
    return sight


def attends_within_images(config: Mapping[str, Any]) -> bool:
    """Whether the tokens of an image attend to all of them, those behind them too (gemma4, but for its small ones)."""
    is_known = str(config.get("model_type")).startswith("gemma4")
    return is_known and any(part.get("use_bidirectional_attention") == "vision" for part in text_configs(config))


def _feature_scale(model: nn.Module) -> float:
    """What features are multiplied by, where the text model multiplies its embeddings and mlx-vlm not its features."""
    for module in model.modules():
        if isinstance(scale := getattr(module, "embed_scale", None), (int, float)):
            return 1 / scale
    return 1.0


def rope_sections(config: Mapping[str, Any]) -> tuple[Sequence[int], bool]:
    """Frequencies per axis (time, row, column) of rotary embeddings that know images, and whether they alternate.

    None of a model whose image tokens have the positions that text would have.
    """
    for part in text_configs(config):
        for name in ("rope_scaling", "rope_parameters"):
            scaling = part.get(name)
            if isinstance(scaling, Mapping) and (sections := scaling.get("mrope_section")):
                chunked = str(config.get("model_type")).startswith(("qwen2_vl", "qwen2_5_vl"))
                return list(sections), not chunked
    return [], False


def _axes(frequencies: int, sections: Sequence[int], is_interleaved: bool) -> list[int]:
    """The axis whose position each frequency turns by."""
    if not is_interleaved:
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
        return (axes + [0] * frequencies)[:frequencies]
    axes = [0] * frequencies
    for axis in (1, 2):
        for index in range(axis, min(3 * sections[axis], frequencies), 3):
            axes[index] = axis
    return axes


def _become(layer: Any, subclass: Any, sight: Sight) -> None:
    layer.__class__ = subclass(type(layer))
    layer.sight = sight


@functools.cache
def _seeing_embedding(own: type) -> type:
    """Embedding whose image tokens are the features of their images."""

    def call(self: Any, tokens: mx.array) -> mx.array:
        embedded: mx.array = own.__call__(self, tokens)  # type: ignore[operator]
        if self.sight.features is not None:
            features = self.sight.features if self.feature_scale == 1 else self.sight.features * self.feature_scale
            embedded = self.sight.replaced(embedded, features)
        return embedded

    return _subclass(own, call)


@functools.cache
def _blank_embedding(own: type) -> type:
    """Embedding of what is added in each layer: image tokens have that of token 0 (gemma4)."""

    def call(self: Any, tokens: mx.array) -> mx.array:
        if (features := self.sight.features) is not None:
            tokens = self.sight.replaced(mx.array(tokens), mx.zeros(features.shape[:1]))
        return own.__call__(self, tokens)  # type: ignore[operator, no-any-return]

    return _subclass(own, call)


@functools.cache
def _seeing_layer(own: type) -> type:
    """Layer behind which features are added to the image tokens."""

    def call(self: Any, x: mx.array, *arguments: Any, **options: Any) -> Any:
        output = own.__call__(self, x, *arguments, **options)  # type: ignore[operator]
        if self.number < len(added := self.sight.added):
            output = self.sight.plus(output, added[self.number])
        return output

    return _subclass(own, call)


@functools.cache
def _seeing_rope(own: type) -> type:
    """Rotary embedding at the positions of image tokens in their images, or shifted (M-RoPE, arXiv:2409.12191)."""

    def call(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self.sight.positions is not None:
            return _rotate(x, *_angles(self, self.sight), self.dims)
        if self.sight.shift is not None:
            offset = offset + self.sight.shift
        return own.__call__(self, x, offset=offset)  # type: ignore[operator, no-any-return]

    return _subclass(own, call)


@functools.cache
def _mutual_masks(own: type) -> type:
    """Text model (gemma4) in whose masks each token of an image sees all of them."""

    def make_masks(self: Any, h: mx.array, cache: Sequence[Any]) -> list[Any]:
        if self.sight.blocks is None:
            return own._make_masks(self, h, cache)  # type: ignore[attr-defined, no-any-return]
        blocks = self.sight.blocks
        mutual = (blocks[:, None] == blocks) & (blocks >= 0)
        masks: dict[str, mx.array] = {}
        for layer, own_cache in zip(self.layers, cache, strict=True):
            if (kind := layer.layer_type) not in masks:
                window = self.window_size if kind == "sliding_attention" else None
                mask = create_attention_mask(h, own_cache, window_size=window, return_array=True)
                before = mask.shape[-1] - mutual.shape[-1]
                masks[kind] = mask | mx.pad(mutual, [(0, 0), (before, 0)])
        return [masks[layer.layer_type] for layer in self.layers]

    return type(own.__name__, (own,), {"_make_masks": make_masks, "__module__": own.__module__})


def _angles(rope: Any, sight: Sight) -> tuple[mx.array, mx.array]:
    """Cosines and sines of a pass, [tokens, dims], or of a step, [rows, 1, 1, dims]."""
    key = (rope.dims, rope.base)
    if key not in sight.angles:
        assert sight.positions is not None
        exponents = mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims
        turned = sight.positions[mx.array(rope.axis_of)].T.astype(mx.float32) * rope.scale
        angles = turned * (rope.base**-exponents)
        angles = mx.concatenate([angles, angles], axis=-1)
        angles = angles if sight.rows is None else angles[:, None, None]
        sight.angles[key] = mx.cos(angles), mx.sin(angles)
    return sight.angles[key]


def _rotate(x: mx.array, cos: mx.array, sin: mx.array, dims: int) -> mx.array:
    """x [rows, heads, tokens, dim], of which the first `dims` are turned, in float32."""
    own = x[..., :dims].astype(mx.float32)
    half = dims // 2
    turned = mx.concatenate([-own[..., half:], own[..., :half]], axis=-1)
    rotated = (own * cos + turned * sin).astype(x.dtype)
    return mx.concatenate([rotated, x[..., dims:]], axis=-1) if dims < x.shape[-1] else rotated


def _subclass(own: type, call: Any) -> type:
    return type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
