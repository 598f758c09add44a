"""Tiny models of random weights from configurations.json, which has one line per architecture and head layout.

Keys are those of a config.json; BASE is common to all (within `text_config`, where there is one), and mlx-lm leaves out
what an architecture does not know. `cache` says what its layers keep: plain keys and values, windows, states (hybrid).
Windows and chunks of attention have 32 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes

_FILE = json.loads((Path(__file__).parent / "configurations.json").read_text())
BASE: dict[str, Any] = _FILE.pop("BASE")
CACHES: dict[str, str] = {name: stated.pop("cache") for name, stated in _FILE.items()}
NAMES = tuple(CACHES)
VOCAB = int(BASE["vocab_size"])
# Sizes that grow with the square of scaled()'s factor, and those that grow with it.
_WIDTHS = {
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("intermediate_size_mlp", "shared_intermediate_size", "block_dim", "block_ff_dim", "mamba_d_ssm"),
    *("kv_lora_rank", "q_lora_rank", "vocab_size"),
}
_HEADS = {
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size_per_head"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "index_n_heads"),
    *("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim", "num_heads"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_n_heads", "mamba_d_head"),
    *("ssm_state_size", "mamba_d_state", "state_size", "sliding_window"),
}


def config(name: str) -> dict[str, Any]:
    """The config.json of an architecture."""
    stated: dict[str, Any] = json.loads(json.dumps(_FILE[name]))
    if text := stated.get("text_config"):
        return {**stated, "text_config": BASE | text, "vocab_size": VOCAB}
    return BASE | stated


def scaled(config: dict[str, Any], factor: int) -> dict[str, Any]:
    """The config.json of a wider model: so many times as many heads and dimensions of each."""

    def grown(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return scaled(value, factor)
        power = 2 if name in _WIDTHS else 1 if name in _HEADS else 0
        return value * factor**power if power and value else value

    return {name: grown(name, value) for name, value in config.items()}


def build(name: str) -> Any:
    """A model whose every layer counts for what it says. Raises whatever mlx-lm does, SystemExit included."""
    model_class, arguments = _get_classes(config(name))
    mx.random.seed(1)  # before it is made: its initial biases stay, with noise
    model = model_class(arguments.from_dict(config(name)))
    model.update(tree_map_with_path(_randomized, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _randomized(name: str, array: mx.array) -> mx.array:
    """A weight with noise of the size that keeps the activations' size; others, near what they were."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    noise: mx.array = mx.random.normal(array.shape)
    if array.ndim < 2 or any(part in name for part in ("A_log", "dt_bias", "conv", "norm")):
        return array + 0.1 * noise
    scaled: mx.array = noise / array.shape[-1] ** 0.5
    return scaled
