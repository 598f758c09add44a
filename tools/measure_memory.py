"""Estimates of memory beside what is measured: after the load, and at the highest of what requests can bring about.

Run: python -m tools.measure_memory [SOURCE ...]; by default the embedded model and three shapes of random weights.
Each model is measured in a process of its own: eight rows fill the cache, then a prompt fills the context. MLX is what
MLX's arrays held at most, RSS what the process held at most; on a CPU that is what the estimate is of, elsewhere MLX.
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

# hidden size, layers, heads, heads of keys and values, width of the feed-forward part, vocabulary
SHAPES = {
    "small": (512, 8, 8, 8, 1408, 32_000),
    "wide": (2048, 4, 16, 4, 5632, 32_000),
    "deep": (768, 24, 12, 4, 2048, 50_000),
}
CACHE_TOKENS, CONTEXT = 2048, 2048
ROWS, ANSWER = 8, 32
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
    """Load the model, let requests take all that they may, and tell the sizes in MiB."""
    spec = ModelSpec("model", source, type="instruction", cache_tokens=CACHE_TOKENS, max_running=ROWS)
    expected = estimate(spec)
    rss, active = device.process_bytes(), device.active_bytes()
    with streams.thread_stream():
        # A target that no chunk reaches: chunks are as long as they may ever be, however slow the machine.
        batch: Any = builder.Builder(stall_target=60.0).build(spec).batch
        loaded = device.active_bytes() - active
        mx.reset_peak_memory()
        answer(batch, rows=ROWS, prompt=CACHE_TOKENS // ROWS - ANSWER - 2)
        answer(batch, rows=1, prompt=CONTEXT - ANSWER - 2)
        mlx, process = mx.get_peak_memory() - active, highest_process_bytes() - rss
        batch.close()
    is_off = expected.total / (process if device.is_cpu() else mlx) - 1
    sizes = {"weights": expected.weights, "loaded": loaded, "total": expected.total, "mlx": mlx, "rss": process}
    return {name: size / MIB for name, size in sizes.items()} | {"off": 100 * is_off}


def answer(batch: Any, *, rows: int, prompt: int) -> None:
    """Let so many rows answer at once. prompt: tokens of each."""
    for n in range(rows):
        batch.insert([Sequence(n, tuple(range(3, 3 + prompt)), SamplingParams(temperature=0.0), ANSWER)])
    said = 0
    while said < rows * ANSWER:
        said += len(batch.decode())
        batch.prefill()
    batch.remove(range(rows))


def highest_process_bytes() -> int:
    """The most that was resident of this process."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # where getrusage counts the parent in
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
