"""Small, real MLX model directories, each written in milliseconds and loadable by mlx_lm.utils.load.

tiny_llama: random weights, a real byte-level BPE tokenizer, ChatML. Where the text of an answer does not matter.
scripted_model: generates exactly its script, at any temperature and in any batch. The script is chosen by a word in the
last user message. For thinking, tool calls, characters cut between tokens, and endless answers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxserver.engine.mlx import mx

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.harness.scripts import (
    BOS,
    EOS,
    Script,
    byte_level,
    cue,
    script_template,
    script_tokenizer,
    successors,
    words,
)

# Tokens of context: endless answers must outlast whoever looks at them, at five thousand tokens a second.
ROOM = 524_288

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? Paris is the capital of France.",
    "Hello, how are you today? I am fine, and you?",
    "One two three four five six seven eight nine ten, and then again from the beginning.",
)


def tiny_llama(
    path: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, context: int = 2048, template: str | None = CHATML
) -> Path:
    """Write a llama of random weights; greedy decoding never ends. template: None for no chat template."""
    tokenizer = _trained_tokenizer()
    vocab = tokenizer.get_vocab_size()
    config = _llama_config(
        vocab,
        hidden,
        heads=hidden // 16,
        kv_heads=hidden // 32,
        head_dim=16,
        width=2 * hidden,
        layers=layers,
        context=context,
    )
    shapes = _random_shapes(vocab, hidden, layers)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {
        name: mx.random.normal(shape, key=key) / shape[1] ** 0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    weights["lm_head.weight"][tokenizer.token_to_id(EOS)] = 0
    return _write(path, tokenizer, template, config, weights)


def scripted_model(
    path: Path,
    scripts: Mapping[str, Script | str],
    *,
    generation_prompt: str = "",
    tokens: Sequence[str] = (),
    context: int = ROOM,
    history: str | None = None,
    layers: int = 1,
) -> Path:
    """Write a model that answers with the script whose key is in the last user message, else with the first script.

    generation_prompt: what the template appends for the answer, such as "<think>\\n". tokens: extra special tokens of
    the vocabulary, such as "<think>" and "</think>", by which mlx-lm recognises a thinking model.
    history: how the template writes past calls (script_template). layers: each takes time, and changes nothing.
    """
    plays = [script if isinstance(script, Script) else words(script) for script in scripts.values()]
    template = script_template(list(scripts), generation_prompt, history)
    return write_scripted(path, plays, template, tokens=tokens, context=context, layers=layers)


def write_scripted(
    path: Path,
    plays: Sequence[Script],
    template: str,
    *,
    tokens: Sequence[str] = (),
    context: int = ROOM,
    layers: int = 1,
) -> Path:
    """Write a model that answers with the script whose cue the template ends in; CUES in it stands for all cues."""
    tokenizer = script_tokenizer(plays, tokens)
    cues = f"{{%- set CUES = {[cue(number) for number in range(len(plays))]!r} %}}" if "CUES" in template else ""
    follows = dict(successors(tokenizer, plays))
    hidden = 64 * (len(follows) // 64 + 1)
    config = _llama_config(
        tokenizer.get_vocab_size(), hidden, heads=1, kv_heads=1, head_dim=64, width=64, layers=layers, context=context
    )
    weights = _successor_weights(config, follows, tokenizer.token_to_id(EOS))
    return _write(path, tokenizer, cues + template, config, weights)


def _random_shapes(vocab: int, hidden: int, layers: int) -> dict[str, tuple[int, int]]:
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (2 * hidden, hidden),
        "mlp.up_proj": (2 * hidden, hidden),
        "mlp.down_proj": (hidden, 2 * hidden),
    }
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    return shapes | {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}


def _trained_tokenizer() -> Tokenizer:
    tokenizer = byte_level(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _successor_weights(config: dict, follows: Mapping[int, int], eos: int) -> dict[str, mx.array]:
    """Weights that map each token to its successor. Dimension 0 is for tokens outside the scripts: the end follows."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    dimension = dict.fromkeys(range(vocab), 0) | {token: n for n, token in enumerate(follows, 1)}
    embedding, head = mx.zeros((vocab, hidden)), mx.zeros((vocab, hidden))
    embedding[mx.arange(vocab), mx.array([dimension[token] for token in range(vocab)])] = 1.0
    head[mx.array([eos, *follows.values()]), mx.arange(len(follows) + 1)] = 1000 / hidden**0.5
    narrow = {
        name: mx.zeros((64, hidden))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    wide = {name: mx.zeros((hidden, 64)) for name in ("self_attn.o_proj", "mlp.down_proj")}
    layers = {
        f"model.layers.{n}.{name}.weight": array
        for n in range(config["num_hidden_layers"])
        for name, array in (narrow | wide).items()
    }
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, **layers}


def _llama_config(
    vocab: int, hidden: int, *, heads: int, kv_heads: int, head_dim: int, width: int, layers: int, context: int
) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def _write(path: Path, tokenizer: Tokenizer, template: str | None, config: dict, weights: dict[str, mx.array]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    hidden = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = mx.ones(hidden)
    weights["model.norm.weight"] = mx.ones(hidden)
    eos = tokenizer.token_to_id(EOS)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        tokenizer_config["chat_template"] = template
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in {
        "config.json": {**config, "eos_token_id": eos, "torch_dtype": "float32"},
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"eos_token_id": eos},
    }.items():
        (path / name).write_text(json.dumps(content, indent=2))
    return path
