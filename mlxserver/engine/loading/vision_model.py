"""Vision part of a checkpoint: tower and projector of mlx-vlm's model, and the processor of its images.

The text model beside them is mlx-lm's, as of any other checkpoint.

Rule: load_tower() runs on the thread that will use the tower.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.kv_cache.caches import weight_bytes
from mlxserver.engine.loading.checkpoint_files import refuse_code
from mlxserver.engine.loading.loader import prepare
from mlxserver.engine.loading.metadata import nested_text_config
from mlxserver.engine.loading.processors import complete_processor, image_token_of
from mlxserver.engine.loading.sources import Progress
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.requests import ProcessedImage

# Types whose features are made of what the last layer of the tower gives, and of no other layer's.
READS_LAST_STATE = frozenset({"gemma3", "idefics3", "kimi_vl", "lfm2-vl", "lfm2_vl", "smolvlm"})


@dataclass(frozen=True, slots=True)
class Features:
    """Features of an image: embeddings of its tokens, [tokens, dim], and what is added to them behind the first layers
    of the text model, one [tokens, dim] per layer.
    """

    embeddings: mx.array
    added: Sequence[mx.array] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in (self.embeddings, *self.added))


class Tower:
    """Vision part of a model. weight_bytes: in memory. layers_added: first layers of the text model behind which it
    adds features.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self._model = model
        self._token = image_token(config)
        self.weight_bytes = weight_bytes(model)
        self.layers_added = len((config.get("vision_config") or {}).get("deepstack_visual_indexes") or ())

    def encode(self, image: ProcessedImage) -> Features:
        """The features of an image, evaluated."""
        with cpu_attention.layer_by_layer(True):
            features = self._features(image)
            mx.eval(features.embeddings, features.added)
        return features

    def check(self, image: ProcessedImage) -> None:
        """Raise what encode() would for layers that do not fit; most of them compute nothing for it."""
        self._features(image)

    def _features(self, image: ProcessedImage) -> Features:
        tokens = mx.full((1, image.tokens), self._token, dtype=mx.int32)
        inputs = {name: mx.array(array) for name, array in image.inputs.items()}
        pixels = inputs.pop("pixel_values")
        found = self._model.get_input_embeddings(tokens, pixels, mask=mx.ones_like(tokens), **inputs)
        added = found.deepstack_visual_embeds
        return Features(found.inputs_embeds[0], () if added is None else list(added))


def load_tower(path: Path, config: Mapping[str, Any], report: Progress, policy: ExecutionPolicy) -> Tower:
    """Read and prepare the vision part of a checkpoint. Raises whatever mlx-vlm does for one that it can't read."""
    from mlx_vlm.utils import load_model

    refuse_code(config)
    model = load_model(path, lazy=True)
    model.language_model = _NoText(hidden_size(config))
    if config.get("model_type") in READS_LAST_STATE:
        keep_last_state(model)
    model = prepare(model, report, replace(policy, fuse_projections=False))
    return Tower(model, config)


def keep_last_state(model: nn.Module) -> None:
    """Have the tower of a model hold the output of one layer at a time: mlx-vlm asks it for those of all."""
    tower = model.vision_tower if hasattr(model, "vision_tower") else model.vision_model
    own: Any = type(tower)

    def call(self: nn.Module, *arguments: Any, output_hidden_states: Any = None, **options: Any) -> Any:
        return own.__call__(self, *arguments, output_hidden_states=False, **options)

    tower.__class__ = type(own.__name__, (own,), {"__call__": call})


def load_processor(path: Path) -> Any:
    """The processor of a checkpoint's images. Raises whatever mlx-vlm or transformers do for one they can't read."""
    from mlx_vlm.utils import get_model_and_args, load_config, load_image_processor
    from mlx_vlm.utils import load_processor as load

    config = load_config(path)
    get_model_and_args(config)  # registers the model's own processor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that are not used: sound, video
        processor = load(path, add_detokenizer=False, trust_remote_code=False)
    if own := load_image_processor(path):
        processor.image_processor = own
    return complete_processor(str(config.get("model_type")), processor)


def with_image_token(config: Mapping[str, Any], processor: Any) -> Mapping[str, Any]:
    """The config.json with the id of the token that stands for a part of an image, which its processor may state."""
    found = image_token_of(processor)
    return config if found is None else {"image_token_index": found, **config}


def image_token(config: Mapping[str, Any]) -> int:
    """Id of the token that stands for a part of an image."""
    for name in ("image_token_index", "image_token_id", "media_placeholder_token_id"):
        if isinstance(found := config.get(name), int):
            return found
    raise ValueError("its config.json names no token of images (image_token_id)")


def hidden_size(config: Mapping[str, Any]) -> int:
    """Size of the text model's embeddings."""
    return int(nested_text_config(config).get("hidden_size") or config.get("hidden_size") or 0)


class _NoText:
    """In place of a text model: embeddings of zeros, which features of images take the place of.

    embed_scale, hidden_size_per_layer_input: as mlx-vlm's gemma4 asks for them.
    """

    embed_scale = 1.0
    hidden_size_per_layer_input = 0

    def __init__(self, size: int) -> None:
        self._size = size
        self.model = self
        self.layers: list[Any] = []

    def embed_tokens(self, tokens: mx.array) -> mx.array:
        """[rows, tokens] -> [rows, tokens, dim]."""
        return mx.zeros((*tokens.shape, self._size))

    def get_rope_index(self, *arguments: Any, **options: Any) -> tuple[None, None]:
        """None: positions of a prompt are not those of an image by itself."""
        return None, None
