"""Tiny embedding checkpoints of random weights, and the same computation in plain numpy."""

import json
import math
from pathlib import Path

from mlxserver.engine.mlx import mx

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
KNOWN = "the cat sat on a mat and dog ran far away from one two three"
WORDS = (*SPECIAL, *KNOWN.split(" "))


def tiny_bert(path: Path, *, pooling: str = "mean_tokens", is_normalized: bool = True, **config: object) -> Path:
    """Write a BERT that reads words, with [CLS] and [SEP] around a text. pooling: as sentence-transformers names it."""
    (path / "1_Pooling").mkdir(parents=True)
    parts = ["Transformer", "Pooling", *(["Normalize"] if is_normalized else [])]
    _write(path / "modules.json", [{"type": f"sentence_transformers.models.{part}"} for part in parts])
    _write(path / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    _write(path / "config.json", settings | config)
    _write(path / "config_sentence_transformers.json", {"prompts": {"query": "the cat ", "document": ""}})
    _write(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    _tokenizer().save(str(path / "tokenizer.json"))
    mx.save_safetensors(str(path / "model.safetensors"), {k: mx.array(v) for k, v in weights().items()})
    return path


def weights() -> dict[str, np.ndarray]:
    """The checkpoint's weights, always the same."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    found = {
        "embeddings.word_embeddings.weight": normal(len(WORDS), HIDDEN),
        "embeddings.position_embeddings.weight": normal(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + normal(HIDDEN),
        "embeddings.LayerNorm.bias": normal(HIDDEN),
    }
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}"
        shapes = {
            **{f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")},
            "attention.output.dense": (HIDDEN, HIDDEN),
            "intermediate.dense": (INNER, HIDDEN),
            "output.dense": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            found |= {f"{layer}.{name}.weight": normal(*shape), f"{layer}.{name}.bias": normal(shape[0])}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found |= {f"{layer}.{name}.weight": 1 + normal(HIDDEN), f"{layer}.{name}.bias": normal(HIDDEN)}
    return found


def hidden_states(tokens: list[int]) -> np.ndarray:
    """Last hidden states of one text, [tokens, hidden] (Devlin et al. 2018)."""
    w = weights()

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    words, positions = w["embeddings.word_embeddings.weight"], w["embeddings.position_embeddings.weight"]
    h = words[tokens] + positions[: len(tokens)] + w["embeddings.token_type_embeddings.weight"][0]
    h = norm(h.astype(np.float64), "embeddings.LayerNorm")
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}"
        q, k, v = (
            linear(h, f"{layer}.attention.self.{name}").reshape(len(tokens), HEADS, -1).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(HIDDEN / HEADS)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(tokens), HIDDEN)
        h = norm(h + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = linear(h, f"{layer}.intermediate.dense")
        inner = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        h = norm(h + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return h


def token_ids(text: str) -> list[int]:
    """Tokens of a text of known words."""
    return [2, *(WORDS.index(word) for word in text.split()), 3]


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))
