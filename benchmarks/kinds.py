"""Models of random weights, one for each kind of KV cache: plain keys and values, sliding windows, recurrent states.

They have an endless tokenizer (vocabulary.py), and are written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import embedded_directory, make_once
from benchmarks.vocabulary import write_endless_tokenizer


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes that the kinds have in common. window: of the sliding layers, in tokens."""

    layers: int
    hidden: int
    head: int
    mlp: int
    vocab: int
    window: int
    dtype: str

    @property
    def config(self) -> dict[str, Any]:
        """The keys of a config.json that all kinds have."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": max(1, self.hidden // self.head // 4),
            "head_dim": self.head,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 65_536,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "eos_token_id": None,
        }


SIZES = {
    "tiny": Size(layers=4, hidden=64, head=16, mlp=128, vocab=49_152, window=64, dtype="float32"),
    "small": Size(layers=8, hidden=384, head=64, mlp=1024, vocab=49_152, window=512, dtype="float32"),
    "1b": Size(layers=16, hidden=2048, head=64, mlp=8192, vocab=128_256, window=1024, dtype="bfloat16"),
}
KINDS = ("plain", "window", "hybrid")


def kind_config(kind: str, size: Size) -> dict[str, Any]:
    """The config.json of a kind: a llama, a Gemma 3 or a Granite 4 with Mamba layers, every fourth with attention."""
    common = size.config
    if kind == "plain":
        return common | {"model_type": "llama"}
    if kind == "window":
        window = {"sliding_window": size.window, "sliding_window_pattern": 4, "query_pre_attn_scalar": size.head}
        return common | window | {"model_type": "gemma3_text"}
    layers = ["attention" if number % 4 == 3 else "mamba" for number in range(size.layers)]
    scales = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    states = {"mamba_n_heads": 2 * size.hidden // size.head, "mamba_d_head": size.head, "mamba_d_state": 128}
    convolution = {"mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False}
    attention = {"attention_multiplier": size.head**-0.5, "shared_intermediate_size": size.mlp, "layer_types": layers}
    return common | scales | states | convolution | attention | {"model_type": "granitemoehybrid"}


def write_kind(kind: str, size: str, work: Path, tokenizer: Path | None = None) -> Path:
    """The directory of a model under `work`, written if missing. tokenizer: a directory; None for the embedded model's.

    Raises FileNotFoundError without a tokenizer.
    """
    directory = work / f"{kind}-{size}"
    source = tokenizer or embedded_directory(work, "float32")
    make_once(directory, lambda target: _write(kind_config(kind, SIZES[size]), SIZES[size], source, target))
    return directory


def _write(config: dict[str, Any], size: Size, tokenizer: Path, target: Path) -> None:
    from mlxserver.engine.mlx import mx

    from mlx_lm.utils import _get_classes, save_config, save_model

    mx.random.seed(0)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(getattr(mx, size.dtype))
    save_model(target, model, donate_model=True)
    save_config(config, target / "config.json")
    write_endless_tokenizer(tokenizer, target, size.vocab)
    del model
    mx.clear_cache()
