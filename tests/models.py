"""Makers of small, real MLX model directories, each written in milliseconds and loadable by mlx_lm.utils.load.

tiny_llama: random weights, a real byte-level BPE tokenizer, ChatML. For all that needs no sense in the answer.
scripted_model: says exactly what a script says, at any temperature and in any company. The script is picked by a word
in the last user message. For thinking, tool calls, characters cut between tokens, and answers that never end.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import engine  # noqa: F401  (first: it prepares the process for MLX)

BOS, EOS = "<|im_start|>", "<|im_end|>"

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? Paris is the capital of France.",
    "Hello, how are you today? I am fine, and you?",
    "One two three four five six seven eight nine ten, and then again from the beginning.",
)


@dataclass(frozen=True)
class Script:
    """What a scripted model says: one token a piece. Pieces in bytes may cut a character. Endless begins again."""

    pieces: Sequence[str | bytes]
    endless: bool = False


def words(text: str) -> Script:
    """A script that says `text`, a word with the white space before it as one token."""
    return Script(re.findall(r"\s*\S+|\s+$", text))


def tiny_llama(
    path: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, context: int = 2048, template: str | None = CHATML
) -> Path:
    """A llama of random weights; greedy decoding never ends by itself. template None writes none."""
    tokenizer = _trained_tokenizer()
    vocab, width, heads = tokenizer.get_vocab_size(), 2 * hidden, hidden // 16
    key = mx.random.key(seed)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    weights = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    keys = mx.random.split(key, len(weights))
    arrays = {
        name: mx.random.normal(shape, key=k) / shape[1] ** 0.5
        for (name, shape), k in zip(weights.items(), keys, strict=True)
    }
    arrays["lm_head.weight"][tokenizer.token_to_id(EOS)] = 0
    config = _llama_config(
        vocab, hidden, heads=heads, kv_heads=heads // 2, head_dim=16, width=width, layers=layers, context=context
    )
    return _write(path, tokenizer, template, config, arrays)


def scripted_model(
    path: Path,
    scripts: Mapping[str, Script | str],
    *,
    generation_prompt: str = "",
    tokens: Sequence[str] = (),
    context: int = 4096,
) -> Path:
    """A model that answers with the script whose word (the key) is in the last user message, else with the first.

    generation_prompt: what the template appends for the answer, such as "<think>\\n". tokens: more special tokens for
    the vocabulary, such as "<think>" and "</think>", which make mlx-lm see a thinking model.
    """
    plays = [script if isinstance(script, Script) else words(script) for script in scripts.values()]
    tokenizer = _script_tokenizer(plays, tokens)
    template = _script_template(list(scripts), generation_prompt)
    successors = dict(_successors(tokenizer, plays))
    hidden = 64 * (len(successors) // 64 + 1)
    config = _llama_config(
        tokenizer.get_vocab_size(), hidden, heads=1, kv_heads=1, head_dim=64, width=64, layers=1, context=context
    )
    return _write(path, tokenizer, template, config, _successor_weights(config, successors, tokenizer.token_to_id(EOS)))


def _trained_tokenizer() -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _script_tokenizer(plays: Sequence[Script], tokens: Sequence[str]) -> Tokenizer:
    """Single bytes for the prompts, and a token of its own for every position of every script.

    A position's token is its text and a mark that the decoder drops, so that equal pieces are different tokens.
    """
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for number, play in enumerate(plays):
        for position, piece in enumerate(play.pieces):
            vocab[_piece_token(piece, number, position)] = len(vocab)
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("\ue000.*"), ""), decoders.ByteLevel()])
    specials = [BOS, EOS, *(_cue(number) for number in range(len(plays))), *tokens]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _piece_token(piece: str | bytes, script: int, position: int) -> str:
    raw = piece.encode() if isinstance(piece, str) else piece
    return "".join(BYTE_CHARS[byte] for byte in raw) + f"\ue000{script}.{position}"


def _byte_chars() -> Iterator[str]:
    """The character that stands for each byte in byte-level BPE: itself where it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return (chr(byte if byte in visible else next(others)) for byte in range(0x100))


BYTE_CHARS = list(_byte_chars())


def _cue(script: int) -> str:
    """The token that starts a script. White space, so that a prompt still ends in what its template appends."""
    return "\u2003" + "\u2002" * script + "\u2003"


def _script_template(names: Sequence[str], generation_prompt: str) -> str:
    cases = "".join(
        f"{{%- {'if' if n == 0 else 'elif'} {name!r} in ask %}}{{{{ '{_cue(n)}' }}}}" for n, name in enumerate(names)
    )
    return (
        "{%- if tools %}{{ tools | tojson }}{% endif %}"
        "{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}"
        "{%- set ask = (messages | selectattr('role', 'equalto', 'user') | list | last).content %}"
        f"{{{{ 'assistant: ' + {generation_prompt!r} }}}}{cases}{{%- else %}}{{{{ '{_cue(0)}' }}}}{{% endif %}}"
        "{%- endif %}"
    )


def _successors(tokenizer: Tokenizer, plays: Sequence[Script]) -> Iterator[tuple[int, int]]:
    """Each token of the scripts with the one that follows it."""
    eos = tokenizer.token_to_id(EOS)
    for number, play in enumerate(plays):
        line = [tokenizer.token_to_id(_piece_token(piece, number, n)) for n, piece in enumerate(play.pieces)]
        last = line[0] if play.endless else eos
        yield from pairwise([tokenizer.token_to_id(_cue(number)), *line, last])


def _successor_weights(config: dict, successors: Mapping[int, int], eos: int) -> dict[str, mx.array]:
    """Dimension 0 stands for every token outside the scripts, whose successor is the end."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    dimension = dict.fromkeys(range(vocab), 0) | {token: n for n, token in enumerate(successors, 1)}
    embedding, head = mx.zeros((vocab, hidden)), mx.zeros((vocab, hidden))
    embedding[mx.arange(vocab), mx.array([dimension[token] for token in range(vocab)])] = 1.0
    head[mx.array([eos, *successors.values()]), mx.arange(len(successors) + 1)] = 1000 / hidden**0.5
    narrow = {
        name: mx.zeros((64, hidden))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    wide = {name: mx.zeros((hidden, 64)) for name in ("self_attn.o_proj", "mlp.down_proj")}
    layer = {f"model.layers.0.{name}.weight": array for name, array in (narrow | wide).items()}
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, **layer}


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
