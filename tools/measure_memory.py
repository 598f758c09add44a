"""Estimates of memory beside what is measured: after the load, and when the cache is full and a prompt is processed.

Run: python -m tools.measure_memory [SOURCE ...]; by default the embedded model and three shapes of random weights.
Each model is measured in a process of its own. RSS is the process's; MLX is what MLX's arrays hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import engine  # noqa: F401  (first: it prepares the process for MLX)

# isort: split
import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model

from engine import device, memory, runtime, sources
from engine.config import ModelSpec
from engine.types import Row, Sampling

# hidden size, layers, heads, heads of keys and values, width of the feed-forward part, vocabulary
SHAPES = {
    "small": (512, 8, 8, 8, 1408, 32_000),
    "wide": (2048, 4, 16, 4, 5632, 32_000),
    "deep": (768, 24, 12, 4, 2048, 50_000),
}
CACHE_TOKENS, CONTEXT = 2048, 2048
MIB = 1 << 20


def write_shape(path: Path, shape: tuple[int, ...]) -> Path:
    """A llama of random weights in float16, with the embedded model's tokenizer."""
    hidden, layers, heads, kv_heads, width, vocab = shape
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "eos_token_id": 2,
    }
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    path.mkdir(parents=True)
    save_model(path, model)
    (path / "config.json").write_text(json.dumps(config))
    for file in sources.resolve("embedded:smollm2").glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def measure(source: str) -> dict[str, float]:
    """Load the model, fill its cache, and tell the sizes in MiB."""
    spec = ModelSpec("model", source, type="instruction", cache_tokens=CACHE_TOKENS, max_running=8)
    estimate = memory.estimate(spec)
    rss, active = device.process_bytes(), device.active_bytes()
    with runtime.thread_stream():
        batch = runtime.Builder(stall_target=0.25).build(spec).batch
        loaded = device.process_bytes() - rss, device.active_bytes() - active
        mx.reset_peak_memory()
        fill(batch)
        full = device.process_bytes() - rss, mx.get_peak_memory() - active
        batch.close()
    sizes = {"weights": estimate.weights, "cache": estimate.cache, "activations": estimate.activations}
    measured = {"loaded_rss": loaded[0], "loaded_mlx": loaded[1], "full_rss": full[0], "full_mlx": full[1]}
    return {name: size / MIB for name, size in (sizes | {"total": estimate.total} | measured).items()}


def fill(batch: Any) -> None:
    """Let as many rows decode as the cache holds."""
    length = CACHE_TOKENS // 8
    prompt = tuple(range(3, 3 + length - 34))
    for n in range(8):
        batch.insert([Row(n, prompt, Sampling(temperature=0.0), 32)])
    said = 0
    while said < 8 * 32:
        said += len(batch.decode())
        batch.prefill()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--one", action="store_true", help="measure a single source here and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.sources[0])))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        made = {name: str(write_shape(Path(directory) / name, shape)) for name, shape in SHAPES.items()}
        wanted = {s: s for s in arguments.sources} or {"embedded:smollm2": "embedded:smollm2", **made}
        print(f"{'MiB':<18}{'weights':>9}{'loaded':>9}{'RSS':>9}   {'total':>9}{'full':>9}{'RSS':>9}")
        for name, source in wanted.items():
            command = [sys.executable, "-m", "tools.measure_memory", "--one", source]
            m = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"{name:<18}{m['weights']:>9.1f}{m['loaded_mlx']:>9.1f}{m['loaded_rss']:>9.1f}   "
                f"{m['total']:>9.1f}{m['full_mlx']:>9.1f}{m['full_rss']:>9.1f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
