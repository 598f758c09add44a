"""Architecture of an embedding model or a reranker: its class, and its sizes before the weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten, tree_unflatten

from mlxserver.engine.loading import kinds
from mlxserver.engine.loading.architecture import inspect_architecture
from mlxserver.engine.loading.metadata import FALLBACK_CONTEXT, attention_heads
from mlxserver.engine.platform.cpu_stored import values_in_layers
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import ExecutionPolicy

# Arrays of an MLP's width that exist for its activation, by its name, and those of any other.
_TEMPORARIES, _OTHER_TEMPORARIES = {"gelu": 10, "silu": 7}, 2
# Architectures whose position embeddings begin behind the number of the padding token.
_OFFSET_POSITIONS = frozenset({"xlm-roberta", "xlm_roberta", "roberta"})
# Names of the bases of rotary embeddings by type of layer, where these differ.
_ROPE_NAMES = {
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "gemma3_text": {"full_attention": "rope_global_base_freq", "sliding_attention": "rope_local_base_freq"},
}


@dataclass(frozen=True, slots=True)
class EncoderArchitecture:
    """Sizes of an encoder in numbers of values. width: activations per token of a layer. heads: of attention.

    context: the longest text in tokens that it has positions for. mlp: width of its MLP and the name of the activation
    there. is_judge: it is a text model that is asked. in_layers: weights that are those of linear and embedding layers.
    """

    weights: int
    width: int
    heads: int
    context: int
    mlp: tuple[int, str] = (0, "")
    is_judge: bool = False
    in_layers: int = 0

    def activation_bytes(self, value_bytes: int, policy: ExecutionPolicy) -> int:
        """Activations per token, without those of attention."""
        return activation_bytes(self.width, *self.mlp, value_bytes, policy)


def inspect_embedding_architecture(config: Mapping[str, Any]) -> EncoderArchitecture:
    """The architecture that a config.json describes, without its weights. Raises whatever mlx-vlm does."""
    return _inspect(_model(with_rope_names(config)), config)


def inspect_reranker_architecture(config: Mapping[str, Any]) -> EncoderArchitecture:
    """The architecture that a reranker's config.json describes, likewise."""
    if kinds.is_cross_encoder(config):
        return _inspect(_model({**with_rope_names(config), "num_labels": 1}, "SequenceClassificationModel"), config)
    model = inspect_architecture(config)
    heads = attention_heads(config, *model.arguments)
    mlp = mlp_of(config)
    return EncoderArchitecture(model.weights, model.width, heads, positions(config), mlp, True, model.in_layers)


def _inspect(model: nn.Module, config: Mapping[str, Any]) -> EncoderArchitecture:
    parameters = [array for _, array in tree_flatten(model.parameters())]
    mx.random.seed(0)  # or else the weights, which are never computed, would stay in this thread's random state
    vocab = int(config.get("vocab_size") or 0)
    outputs = sum(array.shape[0] for array in parameters if array.ndim == 2 and array.shape[0] != vocab)
    return EncoderArchitecture(
        sum(array.size for array in parameters),
        outputs // max(1, len(model.layers)),
        attention_heads(config),
        positions(config),
        mlp_of(config),
        in_layers=values_in_layers(model),
    )


def mlp_of(config: Mapping[str, Any]) -> tuple[int, str]:
    """Width of the MLP that a config.json states, and the name of its activation."""
    names = ("hidden_activation", "hidden_act", "activation")
    width = config.get("intermediate_size")
    return width if type(width) is int else 0, next((str(config[name]) for name in names if config.get(name)), "gelu")


def activation_bytes(width: int, mlp: int, activation: str, value_bytes: int, policy: ExecutionPolicy) -> int:
    """Bytes per token that an encoder computed layer by layer holds, without those of attention.

    On a CPU, where arrays are made while others wait to be freed, twice those of a layer exist, and without a native
    kernel the exponentials of its activation are made of several operations, each with an array of the MLP's width
    (cpu_kernels.py).
    """
    if not policy.replace_kernels:
        return width * value_bytes
    has_kernel = activation in _TEMPORARIES and native() is not None
    arrays = 1 if has_kernel else _TEMPORARIES.get(activation, _OTHER_TEMPORARIES)
    return (2 * width + arrays * mlp) * value_bytes


def with_rope_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json with the bases of its rotary embeddings under their earlier names, which mlx-vlm reads.

    transformers 5 writes them into `rope_parameters`, one for all layers or one per type of layer.
    """
    stated = config.get("rope_parameters")
    parts = stated if isinstance(stated, dict) else {}
    names = _ROPE_NAMES.get(str(config.get("model_type")), {"": "rope_theta"})
    found = {}
    for layers, name in names.items():
        part = parts.get(layers) if layers else parts
        if isinstance(part, dict) and "rope_theta" in part:
            found[name] = part["rope_theta"]
    return {**found, **config}


def replace_activations(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give a ModernBERT the activation that its config.json states; mlx-vlm's class approximates it with tanh."""
    if config.get("model_type") == "modernbert" and config.get("hidden_activation", "gelu") == "gelu":
        found = [name for name, layer in model.named_modules() if isinstance(layer, nn.GELU)]
        model.update_modules(tree_unflatten([(name, nn.GELU()) for name in found]))


def positions(config: Mapping[str, Any]) -> int:
    """The longest text in tokens that a model has positions for."""
    stated = config.get("max_position_embeddings")
    if type(stated) is not int or stated < 1:
        return FALLBACK_CONTEXT
    pad = config.get("pad_token_id")
    offset = 1 + (pad if type(pad) is int else 1) if config.get("model_type") in _OFFSET_POSITIONS else 0
    return max(1, stated - offset)


def _model(config: dict[str, Any], class_name: str = "Model") -> nn.Module:
    """The model with weights that are never evaluated."""
    from mlx_vlm.embedding_loader import EMBEDDING_MODEL_REMAPPING
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    model_type = str(config.get("model_type", "")).lower()
    config = {**config, "model_type": EMBEDDING_MODEL_REMAPPING.get(model_type, model_type)}
    module, _ = get_model_and_args(config=config)
    config.setdefault("text_config", {})
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    arguments = update_module_configs(module.ModelConfig.from_dict(config), module, config, ["text"])
    return getattr(module, class_name)(arguments)
