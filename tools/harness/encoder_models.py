"""Tiny checkpoints of random weights for embeddings and rerank, a family each, made with the classes that run them."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx.utils import tree_flatten
from mlx_lm.models import qwen3 as qwen3_text
from mlx_vlm.models import bert, gemma3_embedding, modernbert, qwen3_embedding, xlm_roberta
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "from", "one", "two", "three"),
    *("query", "judge", "whether", "document", "meets", "yes", "no"),
)
HIDDEN, POSITIONS = 32, 96
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
_DECODER = _ENCODER | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A family of encoders. modules: its classes. single, pair: around one text and two, as tokenizers write them;
    tokens of the vocabulary come in the order of `special`, so that its padding has the number that the family expects.
    parts: for sentence-transformers, behind the transformer.
    """

    module: ModuleType
    architecture: str
    config: dict[str, Any]
    special: tuple[str, ...]
    single: str
    pair: str = ""
    pooling: str = "mean"
    parts: tuple[str, ...] = ("Pooling", "Normalize")
    pad: int = 0


_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_XLM = ("<s>", "<pad>", "</s>", "<unk>")
_QWEN = ("<|endoftext|>", "[UNK]", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
FAMILIES = {
    "bert": Family(
        bert, "BertModel", _ENCODER, _BERT, "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", pooling="cls"
    ),
    "xlm-roberta": Family(
        xlm_roberta,
        "XLMRobertaModel",
        _ENCODER | {"max_position_embeddings": POSITIONS + 2},
        _XLM,
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        pad=1,
    ),
    "modernbert": Family(
        modernbert,
        "ModernBertModel",
        _ENCODER | {"local_attention": 8},
        _BERT,
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B [SEP]",
    ),
    "qwen3": Family(
        qwen3_embedding,
        "Qwen3ForCausalLM",
        _DECODER | {"hidden_act": "silu"},
        _QWEN,
        "$A <|endoftext|>",
        pooling="lasttoken",
    ),
    "gemma3_text": Family(
        gemma3_embedding,
        "Gemma3TextModel",
        _DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
        ("<pad>", "<eos>", "<bos>", "[UNK]"),
        "<bos> $A <eos>",
        parts=("Pooling", "Dense", "Dense", "Normalize"),
    ),
}
CROSS_ENCODERS = ("bert", "xlm-roberta", "modernbert")


def tiny_embedder(path: Path, name: str, **settings: Any) -> Path:
    """Write an embedding model of a family, as its makers publish it for sentence-transformers."""
    family = FAMILIES[name]
    config = _config(name, settings)
    weights = _weights(family.module.Model(_arguments(family, config)))
    _write(path, family, config, weights)
    folders = ["", *(f"{n}_{part}" for n, part in enumerate(family.parts, start=1))]
    parts = [
        {"type": f"sentence_transformers.models.{folder.partition('_')[2] or 'Transformer'}"} for folder in folders
    ]
    _json(path / "modules.json", parts)
    _json(path / "1_Pooling" / "config.json", {f"pooling_mode_{_MODES[family.pooling]}": True})
    for n, folder in enumerate(folder for folder in folders if "Dense" in folder):
        (path / folder).mkdir()
        weight = weights.pop(f"dense.{n}.weight")
        mx.save_safetensors(str(path / folder / "model.safetensors"), {"linear.weight": weight})
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def tiny_cross_encoder(path: Path, name: str, **settings: Any) -> Path:
    """Write a cross-encoder of a family."""
    family = FAMILIES[name]
    architecture = family.architecture.replace("Model", "ForSequenceClassification")
    config = _config(name, {"architectures": [architecture], "id2label": {"0": "LABEL_0"}} | settings)
    model = family.module.SequenceClassificationModel(_arguments(family, config | {"num_labels": 1}))
    weights = _weights(model)
    _write(path, family, config, weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def tiny_judge(path: Path, **settings: Any) -> Path:
    """Write a Qwen3 that judges by yes and no. It is known by its part that makes scores, not by its path."""
    family = FAMILIES["qwen3"]
    config = _config("qwen3", {"max_position_embeddings": 512} | settings)
    model = qwen3_text.Model(qwen3_text.ModelArgs.from_dict(config))
    weights = _weights(model)
    if "quantization" in config:
        model.load_weights(list(weights.items()))
        nn.quantize(model, **config["quantization"])
        weights = dict(tree_flatten(model.parameters()))
    _write(path, family, config, weights, template=CHATML)
    parts = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    _json(path / "modules.json", [{"type": f"sentence_transformers.{part}"} for part in parts])
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


_MODES = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}


def _config(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    family = FAMILIES[name]
    return {
        "model_type": name,
        "architectures": [family.architecture],
        "vocab_size": len(family.special) + len(WORDS),
        "pad_token_id": family.pad,
        **family.config,
        **settings,
    }


def _arguments(family: Family, config: dict[str, Any]) -> Any:
    return family.module.ModelConfig.from_dict(config)


def _weights(model: Any) -> dict[str, mx.array]:
    """Random weights, always the same; those of norms about 1."""
    found = {}
    for n, (name, array) in enumerate(sorted(tree_flatten(model.parameters()))):
        values = mx.random.normal(array.shape, key=mx.random.key(n)) / array.shape[-1] ** 0.5
        found[name] = 1 + values if "norm" in name.lower() and name.endswith("weight") else values
    return found


def _write(
    path: Path, family: Family, config: dict[str, Any], weights: dict[str, mx.array], template: str | None = None
) -> None:
    path.mkdir(parents=True)
    _json(path / "config.json", config)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": family.special[family.pad]}
    inputs = ["input_ids", *(["token_type_ids"] if ":1" in family.pair else []), "attention_mask"]
    _json(
        path / "tokenizer_config.json",
        settings | {"model_input_names": inputs} | ({"chat_template": template} if template else {}),
    )
    _tokenizer(family).save(str(path / "tokenizer.json"))


def _tokenizer(family: Family) -> Tokenizer:
    words = {word: n for n, word in enumerate((*family.special, *WORDS))}
    unknown = next(word for word in family.special if "unk" in word.lower())
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, words[word]) for word in family.special]
    pairs = {"pair": family.pair} if family.pair else {}
    tokenizer.post_processor = processors.TemplateProcessing(single=family.single, special_tokens=special, **pairs)
    tokenizer.add_special_tokens(list(family.special))
    return tokenizer


def _json(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
