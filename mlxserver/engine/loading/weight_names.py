"""Weight names of transformers 5, which nests a text model as `model.language_model.*`, for mlx-lm's models.

Most of mlx-lm's models with a part `language_model.model` read that layout, but gemma3, llama4, kimi_k25, kimi_vl,
pixtral and lfm2-vl do not. All of them read their own names, so weights get those first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlxserver.engine.loading.metadata import nested_text_config

_NESTED, _OWN = "model.language_model.", "language_model.model."
_HEAD = "lm_head."
_BY_TEXT = {"kimi_vl": "deepseek_v3"}  # types whose published weights mlx-lm's class can't read, and its text model can
_TEXT_PREFIXES = (_NESTED, "model.text_model.", "text_model.", "language_model.")


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """The classes of a model and its arguments, as mlx-lm's load_model() takes them."""
    if text := _BY_TEXT.get(str(config.get("model_type"))):
        return _nesting(*_get_classes({"model_type": text}))
    try:
        model_class, arguments = _get_classes(config)
    except ValueError:
        if not (nested := nested_text_config(config)):
            raise
        return _nesting(*_get_classes(nested))
    return _renaming(model_class), arguments


@functools.cache
def _renaming(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass that renames weights before they are sanitized."""

    own: Callable[[Any, dict[str, mx.array]], dict[str, mx.array]] | None = getattr(model_class, "sanitize", None)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return own(self, renamed(self, weights)) if own else renamed(self, weights)

    body = {"sanitize": sanitize, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


@dataclass
class _NestedArguments:
    """Arguments of a model that has a text model beside its towers."""

    model_type: str
    text_config: dict[str, Any]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> _NestedArguments:
        """From a config.json."""
        return cls(str(config["model_type"]), nested_text_config(config))


@functools.cache
def _nesting(text_class: type[nn.Module], text_arguments: type[Any]) -> tuple[type[nn.Module], type[Any]]:
    """Classes of a model of whose type mlx-lm has the text model alone (idefics3, smolvlm, internvl, internvl_chat)."""

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self, args: _NestedArguments) -> None:
            super().__init__()
            self.args = args
            self.model_type = args.model_type
            self.language_model = text_class(text_arguments.from_dict(args.text_config))
            if hasattr(self.language_model, "make_cache"):
                self.make_cache = self.language_model.make_cache

        def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
            return cast(mx.array, self.language_model(inputs, cache=cache, **options))

        @property
        def layers(self) -> Any:
            return self.language_model.layers

        def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
            own = dict(_text_weights(weights))
            if _HEAD + "weight" not in own and "lm_head" in self.language_model:
                own[_HEAD + "weight"] = own["model.embed_tokens.weight"]  # tied, without a word of it
            sanitize = getattr(self.language_model, "sanitize", dict)
            return {f"language_model.{name}": array for name, array in sanitize(own).items()}

    return Model, _NestedArguments


def _text_weights(weights: Mapping[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The weights of the text model, by the names that it has alone."""
    for name, array in weights.items():
        for prefix in _TEXT_PREFIXES:
            if name.startswith(prefix):
                own = name.removeprefix(prefix)
                yield own if own.startswith(("model.", _HEAD)) else f"model.{own}", array
                break
        else:
            if name.startswith(_HEAD):
                yield name, array


def renamed(model: nn.Module, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The weights by the names of a model that has `language_model.model`, without towers for images and sound.

    Those of any other model, or in any other layout, as they are.
    """
    is_nested = any(name.startswith(_NESTED) for name in weights)
    if not is_nested or not any(name.startswith(_OWN) for name, _ in tree_flatten(model.parameters())):
        return dict(weights)
    names = {}
    for name, array in weights.items():
        if name.startswith(_NESTED):
            names[_OWN + name.removeprefix(_NESTED)] = array
        elif name.startswith(_HEAD):
            names[f"language_model.{name}"] = array
        elif not name.startswith("model."):  # what else is in there are the towers
            names[name] = array
    return names
