"""Weight names of transformers 5, which nests a text model as `model.language_model.*`, for mlx-lm's models.

Most of mlx-lm's models with a part `language_model.model` read that layout, but gemma3, llama4, kimi_k25, kimi_vl,
pixtral and lfm2-vl do not. All of them read their own names, so weights get those first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

_NESTED, _OWN = "model.language_model.", "language_model.model."
_HEAD = "lm_head."


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """The classes of a model and its arguments, as mlx-lm's load_model() takes them."""
    model_class, arguments = _get_classes(config)
    return _renaming(model_class), arguments


@functools.cache
def _renaming(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass that renames weights before they are sanitized."""

    own: Callable[[Any, dict[str, mx.array]], dict[str, mx.array]] | None = getattr(model_class, "sanitize", None)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return own(self, renamed(self, weights)) if own else renamed(self, weights)

    body = {"sanitize": sanitize, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


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
