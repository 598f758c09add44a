"""Memory estimates against measurements: after the load, and at the peak that requests can cause.

Run: python -m tools.measure_memory [SOURCE ...]; by default the embedded model and three shapes of random weights.
Each model is measured in a separate process: eight sequences fill the KV cache, then one prompt fills the context. MLX
is the peak of MLX's arrays, RSS that of the process; the estimate is of RSS on a CPU, of MLX elsewhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.platform import device, streams
from mlxserver.engine.runners import builder
from mlxserver.engine.sequence import Sequence

# hidden size, layers, heads, KV heads, width of the MLP, vocabulary
SHAPES = {
    "small": (512, 8, 8, 8, 1408, 32_000),
    "wide": (2048, 4, 16, 4, 5632, 32_000),
    "deep": (768, 24, 12, 4, 2048, 50_000),
}
CACHE_TOKENS, CONTEXT = 2048, 2048
SEQUENCES, ANSWER = 8, 32
MIB = 1 << 20


def write_shape(path: Path, shape: tuple[int, ...]) -> Path:
    """Write a llama of random float16 weights with the embedded model's tokenizer."""
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
    """Load the model and run the largest requests; the sizes in MiB, and the deviation of the estimate in percent."""
    spec = ModelSpec("model", source, type="instruction", cache_tokens=CACHE_TOKENS, max_running=SEQUENCES)
    expected = estimate(spec)
    rss, active = device.process_bytes(), device.active_bytes()
    with streams.thread_stream():
        # A target that no chunk reaches: chunks have their greatest length, however slow the machine.
        batch: Any = builder.Builder(stall_target=60.0).build(spec).batch
        loaded = device.active_bytes() - active
        mx.reset_peak_memory()
        answer(batch, sequences=SEQUENCES, prompt=CACHE_TOKENS // SEQUENCES - ANSWER - 2)
        answer(batch, sequences=1, prompt=CONTEXT - ANSWER - 2)
        mlx, process = mx.get_peak_memory() - active, highest_process_bytes() - rss
        batch.close()
    is_off = expected.total / (process if device.is_cpu() else mlx) - 1
    sizes = {"weights": expected.weights, "loaded": loaded, "total": expected.total, "mlx": mlx, "rss": process}
    return {name: size / MIB for name, size in sizes.items()} | {"off": 100 * is_off}


def answer(batch: Any, *, sequences: int, prompt: int) -> None:
    """Generate the answers of `sequences` at once. prompt: tokens of each."""
    for n in range(sequences):
        batch.insert([Sequence(n, tuple(range(3, 3 + prompt)), SamplingParams(temperature=0.0), ANSWER)])
    generated = 0
    while generated < sequences * ANSWER:
        generated += len(batch.decode())
        batch.prefill()
    batch.remove(range(sequences))


def highest_process_bytes() -> int:
    """Peak of the resident memory of this process."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # getrusage would include the parent's memory
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


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
        print(f"{'MiB':<18}{'weights':>9}{'loaded':>9}   {'estimate':>9}{'MLX':>9}{'RSS':>9}{'off':>8}")
        for name, source in wanted.items():
            command = [sys.executable, "-m", "tools.measure_memory", "--one", source]
            m = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"{name:<18}{m['weights']:>9.1f}{m['loaded']:>9.1f}   "
                f"{m['total']:>9.1f}{m['mlx']:>9.1f}{m['rss']:>9.1f}{m['off']:>+7.1f}%",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
