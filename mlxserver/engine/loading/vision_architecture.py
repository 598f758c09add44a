"""Architecture of a model's vision part in numbers, as mlx-vlm builds it from a config.json, without its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten

from mlxserver.engine.loading.encoder_architecture import activation_bytes
from mlxserver.engine.loading.kinds import SEEING
from mlxserver.engine.loading.metadata import nested_text_config
from mlxserver.engine.loading.unsupported import Unsupported
from mlxserver.engine.platform.attention_memory import AttentionMemory
from mlxserver.engine.platform.cpu_stored import values_in_layers
from mlxserver.engine.platform.environment import LARGEST_KEPT
from mlxserver.engine.platform.policy import ExecutionPolicy

FEATURE_BYTES = 64 << 20  # of the features of images that were seen, kept per model
PIXEL_BYTES = 64 << 20  # of images that were processed, kept per model
_MOST_PATCHES = 16_384  # of a picture of any size
# Types whose tower takes pictures of any size; those of all others are scaled to one, or cut into tiles of one.
_ANY_SIZE = frozenset(
    {
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        *("pixtral", "mistral3", "kimi_vl"),
    }
)
# Most tiles that a large picture is cut into, the whole of it among them.
_TILES = {
    **{"idefics3": 17, "smolvlm": 17, "lfm2_vl": 11, "lfm2-vl": 11, "internvl": 13, "internvl_chat": 13},
    **{"llama4": 5, "aya_vision": 13},
}
_STATED_TILES = dict.fromkeys(("internvl", "internvl_chat"), "max_dynamic_patch") | {"aya_vision": "max_splits_per_img"}
# Types whose features are made of the outputs of several layers, all of which are held.
_KEEPS_STATES = frozenset({"aya_vision", "llava", "llava_onevision", "mistral3", "pixtral"})
# Positions whose angles mlx-vlm computes for each picture, some arrays of a head's dimensions in all.
_ANGLES, _ANGLE_BYTES = {"kimi_vl": 512 * 512}, 18


@dataclass(frozen=True, slots=True)
class VisionArchitecture:
    """Sizes of a vision part. weights: number of values. width: activations per patch of a layer. heads: of attention.

    patch: its side in pixels. image: side of the pictures in pixels, 0 for any. tiles: that a picture is cut into.
    in_layers: weights that are those of linear and embedding layers. mlp: width of a layer's MLP. hidden: of what a
    layer gives. states: layers of which that is held. angles: values of a table that is made for each picture.
    """

    weights: int
    width: int
    heads: int
    patch: int
    image: int = 0
    tiles: int = 1
    in_layers: int = 0
    mlp: int = 0
    hidden: int = 0
    states: int = 0
    angles: int = 0

    def most_patches(self, policy: ExecutionPolicy) -> int:
        """Patches of the largest picture, or of a tile of it, that the tower is given."""
        if self.image:
            return (self.image // self.patch) ** 2
        return min(_MOST_PATCHES, AttentionMemory(self.heads, policy).longest_text())

    def most_pixels(self, policy: ExecutionPolicy) -> int | None:
        """Pixels that a picture is scaled down to before it is processed; None where its processor does that."""
        return None if self.image else self.most_patches(policy) * self.patch**2

    @property
    def kept_bytes(self) -> int:
        """What is kept of images that were seen, pixels and features."""
        return FEATURE_BYTES + PIXEL_BYTES

    def activation_bytes(self, value_bytes: int, policy: ExecutionPolicy) -> int:
        """Activations of the largest picture."""
        patches = self.most_patches(policy)
        attention = AttentionMemory(self.heads, policy).batch_bytes(self.tiles * patches, patches)
        state = self.tiles * patches * self.hidden * value_bytes
        layers = self.tiles * patches * activation_bytes(self.width, self.mlp, "", value_bytes, policy)
        if (
            policy.replace_kernels and state > LARGEST_KEPT
        ):  # what is made ahead takes no memory before it is written to
            layers -= self.tiles * patches * self.width * value_bytes
        return max(layers + self.states * state + attention, self.angles * _ANGLE_BYTES)


def inspect_vision_architecture(config: Mapping[str, Any]) -> VisionArchitecture:
    """The vision part that a config.json describes. Raises Unsupported for a type that is not one of SEEING, and
    whatever mlx-vlm does for one that it can't build.
    """
    if (model_type := str(config.get("model_type"))) not in SEEING:
        raise Unsupported(
            f"vision models of the type {model_type!r} are not supported ({', '.join(sorted(SEEING))} are); "
            "with kind = text it is loaded without its vision part"
        )
    model = build_model(dict(config))
    model.language_model = None
    parameters = [array for _, array in tree_flatten(model.parameters())]
    mx.random.seed(0)  # or else the weights, which are never computed, would stay in this thread's random state
    vision = config["vision_config"]
    patch, image = (_side(vision.get(name)) for name in ("patch_size", "image_size"))
    if model_type in ("lfm2_vl", "lfm2-vl"):  # image_size is that of its makers' pre-training
        image = int(config.get("tile_size") or 512)
    layers = int(vision.get("num_hidden_layers") or vision.get("depth") or vision.get("num_layers") or 24)
    heads = int(vision.get("num_attention_heads") or vision.get("num_heads") or 16)
    hidden = int(vision.get("embed_dim") or vision.get("hidden_size") or 0)
    outputs = sum(array.shape[0] for array in parameters if array.ndim == 2)
    return VisionArchitecture(
        sum(math.prod(array.shape) for array in parameters),
        max(1, outputs // layers),
        heads,
        patch or 14,
        0 if model_type in _ANY_SIZE else image or 896,
        _most_tiles(model_type, config),
        values_in_layers(model),
        int(vision.get("intermediate_size") or 0),
        hidden,
        layers if model_type in _KEEPS_STATES else 0,
        _ANGLES.get(model_type, 0) * hidden // heads,
    )


def _most_tiles(model_type: str, config: Mapping[str, Any]) -> int:
    """Most tiles of a picture, the whole of it among them; a config.json may state those without it, or sizes."""
    if sizes := config.get("image_grid_pinpoints"):
        side = _side(config["vision_config"].get("image_size"))
        return 1 + int(max(map(math.prod, sizes))) // side**2
    stated = config.get(_STATED_TILES.get(model_type, ""))
    return stated + 1 if type(stated) is int and stated > 0 else _TILES.get(model_type, 1)


def _side(stated: Any) -> int:
    """A side in pixels, of which some state two."""
    return int(stated[0] if isinstance(stated, list) else stated or 0)


def build_model(config: dict[str, Any]) -> nn.Module:
    """mlx-vlm's model of a config.json, with weights that are never evaluated."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    classes, _ = get_model_and_args(config=config)
    config.setdefault("text_config", nested_text_config(config))
    for part in ("vision_config", "audio_config"):
        config.setdefault(part, {})
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    arguments = update_module_configs(classes.ModelConfig.from_dict(config), classes, config, parts)
    return classes.Model(arguments)
