"""Memory estimates against measurements: after the load, and at the peak that requests can cause.

Run: python -m tools.measure_memory [--tiny] [SOURCE ...]; by default the embedded models, three llamas, ten
architectures of the zoo, vision models, embedding models and rerankers, of random weights. SOURCE may be the name of
one of those, too. Each model is measured in a separate process: eight sequences fill the KV cache, then one prompt
fills the context, and a vision model sees large pictures; or, of embedding models and rerankers, texts of several
lengths fill the largest batches. MLX is the peak of MLX's arrays, RSS that of the process; the estimate is of RSS on a
CPU, of MLX elsewhere. Held: by the sequences, with the prefixes that are kept. Of images, the estimate here counts what
these pictures leave, not all that may be kept.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlx_lm.utils import _get_classes, save_model

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Image, Message, Text
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.architecture import inspect_architecture
from mlxserver.engine.loading.estimate import Estimate, estimate, most_batch_tokens
from mlxserver.engine.loading.vision_architecture import FEATURE_BYTES, PIXEL_BYTES
from mlxserver.engine.loading.vision_model import hidden_size
from mlxserver.engine.platform import device, streams
from mlxserver.engine.platform.policy import current
from mlxserver.engine.requests import ChatPrompt, GenerationRequest
from mlxserver.engine.runners import builder
from mlxserver.engine.sequence import Sequence
from tools.harness.encoder_models import tiny_cross_encoder, tiny_embedder, tiny_judge
from tools.harness.vision_models import picture, tiny_vision
from tools.zoo import models


def encoder_config(hidden: int, heads: int, layers: int, positions: int) -> dict[str, Any]:
    """Sizes of an encoder; an MLP is four times as wide."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": positions,
        "vocab_size": 30_000,
    }


# hidden size, layers, heads, KV heads, width of the MLP, vocabulary
LLAMAS = {
    "small": (512, 8, 8, 8, 1408, 32_000),
    "wide": (2048, 4, 16, 4, 5632, 32_000),
    "deep": (768, 24, 12, 4, 2048, 50_000),
}
# Kinds of caches: plain, windows, MLA, MLA with an index, states beside plain ones, states alone.
ZOO = (
    *("llama", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v32"),
    *("falcon_h1", "qwen3_next", "nemotron_h", "jamba", "plamo2", "mamba2", "rwkv7"),
)
# Embedding models and rerankers: how they are written, their family, and their sizes.
ENCODERS: dict[str, tuple[Callable[..., Path], tuple[str, ...], dict[str, Any]]] = {
    "bert vectors": (tiny_embedder, ("bert",), encoder_config(384, 12, 6, 512)),
    "gemma3 vectors": (tiny_embedder, ("gemma3_text",), encoder_config(512, 8, 8, 1024)),
    "xlm-r rerank": (tiny_cross_encoder, ("xlm-roberta",), encoder_config(768, 12, 6, 514)),
    "modernbert rerank": (tiny_cross_encoder, ("modernbert",), encoder_config(768, 12, 8, 1024)),
    "qwen3 rerank": (tiny_judge, (), encoder_config(1024, 16, 6, 4096)),
}
# Vision models: sizes of their text models and towers, and of the pictures that their processors make.
_SEEN_TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
_SEEN_TEXT |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 30_000}
_TOWER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
_QWEN_TOWER: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "depth": 8,
    "num_heads": 8,
    "out_hidden_size": 512,
}
_QWEN_TOWER |= {"patch_size": 14, "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [3, 7]}
_QWEN_PIXELS = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12_845_056}
_PINPOINTS = [[384 * rows, 384 * columns] for rows in (1, 2) for columns in (1, 2)]
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text": {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
        "vision": _QWEN_TOWER,
        "files": {"preprocessor_config.json": _QWEN_PIXELS},
    },
    "qwen3_vl": {
        "text": {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]}},
        "vision": _QWEN_TOWER | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [2, 4]},
        "files": {"preprocessor_config.json": _QWEN_PIXELS},
    },
    "gemma3": {
        "text": {"query_pre_attn_scalar": 64, "sliding_window": 512, "mm_tokens_per_image": 256},
        "vision": _TOWER | {"patch_size": 14, "image_size": 896},
        "files": {
            "preprocessor_config.json": {"size": {"height": 896, "width": 896}},
            "processor_config.json": {"image_seq_length": 256},
        },
        "hidden_size": 512,
        "mm_tokens_per_image": 256,
    },
    "smolvlm": {
        "vision": _TOWER | {"patch_size": 16, "image_size": 512},
        "files": {
            "preprocessor_config.json": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            "processor_config.json": {"image_seq_len": 64},
        },
        "scale_factor": 4,
    },
    "mistral3": {
        "vision": _TOWER | {"head_dim": 64, "patch_size": 14, "image_size": 1540},
        "files": {
            "preprocessor_config.json": {
                "size": {"longest_edge": 1540},
                "patch_size": {"height": 14, "width": 14},
            },
            "processor_config.json": {"patch_size": 14},
        },
    },
    "llava": {
        "vision": _TOWER | {"patch_size": 14, "image_size": 336},
        "files": {
            "preprocessor_config.json": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
            "processor_config.json": {"patch_size": 14},
        },
    },
    "internvl": {
        "vision": _TOWER | {"patch_size": [14, 14], "image_size": [448, 448]},
        "files": {"processor_config.json": {"image_seq_length": 256}},
        "max_dynamic_patch": 5,
    },
    "lfm2_vl": {
        "text": {"block_dim": 512, "conv_dim": 512, "block_ff_dim": 1408}
        | {"layer_types": ["conv", "full_attention"] * 4, "max_position_embeddings": 4096},
        "vision": _TOWER | {"patch_size": 16, "num_patches": 256},
        "files": {
            "preprocessor_config.json": {"tile_size": 512, "encoder_patch_size": 16, "max_image_tokens": 256}
            | {"min_image_tokens": 64, "max_tiles": 10, "max_pixels_tolerance": 2.0}
        },
        **{"tile_size": 512, "encoder_patch_size": 16, "max_image_tokens": 256, "max_tiles": 10},
    },
    "kimi_vl": {
        "text": {"num_key_value_heads": 8, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64}
        | {"v_head_dim": 64, "n_routed_experts": 8, "moe_intermediate_size": 352},
        "vision": {"hidden_size": 512, "embed_dim": 512, "intermediate_size": 2048, "depth": 8, "num_heads": 8}
        | {"patch_size": 14, "spatial_patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64},
        "files": {"preprocessor_config.json": {"patch_size": 14}},
    },
    "internvl_chat": {
        "vision": _TOWER | {"patch_size": 14, "image_size": 448},
        "files": {"preprocessor_config.json": {"size": 448}},
        **{"force_image_size": 448, "max_dynamic_patch": 5},
    },
    "aya_vision": {
        "text": {"sliding_window": 512},
        "vision": _TOWER | {"patch_size": 14, "image_size": 364},
        "files": {
            "preprocessor_config.json": {"size": {"height": 364, "width": 364}, "max_patches": 5},
            "processor_config.json": {"patch_size": 14, "img_size": 364},
        },
        **{"alignment_intermediate_size": 2048, "max_splits_per_img": 5},
    },
    "llava_onevision": {
        "text": {"max_position_embeddings": 4096},
        "vision": _TOWER | {"patch_size": 14, "image_size": 384},
        "files": {
            "preprocessor_config.json": {
                "size": {"height": 384, "width": 384},
                "image_grid_pinpoints": _PINPOINTS,
            },
            "processor_config.json": {"num_image_tokens": 729},
        },
        "image_grid_pinpoints": _PINPOINTS,
    },
    "llama4": {
        "text": {"intermediate_size_mlp": 2816, "attention_chunk_size": 512},
        "vision": _TOWER
        | {"patch_size": 14, "image_size": 336}
        | dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 512),
        "files": {"preprocessor_config.json": {"size": {"height": 336, "width": 336}, "max_patches": 5}},
    },
}
SIDE = 2048  # pixels of the pictures' sides
PICTURES = 8  # which fill what is kept of them
FACTOR = 4  # of the zoo's heads and their dimensions; hidden sizes grow with its square
TOKENS = 2048  # of the context, and of the cache
LONGER = {"lfm2_vl": 4096, "llava_onevision": 4096}  # of one whose picture has more tokens
SEQUENCES, ANSWER = 8, 32
MIB = 1 << 20


def llama_config(shape: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of one of LLAMAS."""
    hidden, layers, heads, kv_heads, width, vocab = shape
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "max_position_embeddings": TOKENS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def config_of(name: str, *, is_tiny: bool) -> dict[str, Any]:
    """The config.json of one of LLAMAS or ZOO."""
    if name in LLAMAS:
        return llama_config(LLAMAS[name])
    return models.scaled(models.config(name), 1 if is_tiny else FACTOR)


def write_model(path: Path, config: dict[str, Any]) -> Path:
    """Write a model of random float16 weights with the embedded model's tokenizer."""
    config = config | {"torch_dtype": "float16", "eos_token_id": 2}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(mx.float16)
    path.mkdir(parents=True)
    save_model(path, model)
    (path / "config.json").write_text(json.dumps(config))
    for file in sources.resolve("embedded:smollm2").glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def measure(source: str, tokens: int, pictures: int) -> dict[str, float]:
    """Load the model and run the largest requests of a context of so many tokens, and so many pictures.

    Returns the sizes in MiB, and the deviation of the estimate in percent.
    """
    spec = ModelSpec("model", source, type="instruction", cache_tokens=tokens, max_running=SEQUENCES)
    expected = with_full_cache(estimate(spec), source, tokens)
    rss, active = device.process_bytes(), device.active_bytes()
    with streams.thread_stream():
        # A target that no chunk reaches: chunks have their greatest length, however slow the machine.
        runner: Any = builder.Builder(stall_target=60.0).build(spec)
        batch = runner.batch
        loaded = device.active_bytes() - active
        mx.reset_peak_memory()
        held = answer(batch, sequences=SEQUENCES, prompt=tokens // SEQUENCES - ANSWER - 2) - active - loaded
        answer(batch, sequences=1, prompt=tokens - ANSWER - 2)
        if runner.facts.kind == "vision":
            dim = hidden_size(sources.checkpoint_metadata(source).config)
            unused = FEATURE_BYTES + PIXEL_BYTES - see(runner, pictures, dim)
            expected = replace(expected, activations=expected.activations - unused)
        mlx, process = mx.get_peak_memory() - active, highest_process_bytes() - rss
        batch.close()
    is_off = expected.total / (process if device.is_cpu() else mlx) - 1
    sizes = {
        **{"weights": expected.weights, "loaded": loaded, "cache": expected.cache, "held": held},
        **{"total": expected.total, "mlx": mlx, "rss": process},
    }
    return {name: size / MIB for name, size in sizes.items()} | {"off": 100 * is_off}


def measure_encoder(source: str) -> dict[str, float]:
    """Load an embedding model or a reranker and run its largest batches; as measure()."""
    spec = ModelSpec("model", source)
    expected = estimate(spec)
    rss, active = device.process_bytes(), device.active_bytes()
    with streams.thread_stream():
        runner = builder.Builder(stall_target=60.0).build(spec)
        loaded = device.active_bytes() - active
        mx.reset_peak_memory()
        longest = runner.facts.context_length
        for length in sorted({longest, longest // 2, longest // 4, 64, 16}, reverse=True):
            count = max(1, most_batch_tokens(longest, current()) // length)
            tokens = tuple(10 + n % 7 for n in range(length))
            runner.batch.insert([Sequence(n, tokens, SamplingParams(), 1) for n in range(count)])
            while not runner.batch.is_empty():
                runner.batch.decode()
        mlx, process = mx.get_peak_memory() - active, highest_process_bytes() - rss
        runner.batch.close()
    is_off = expected.total / (process if device.is_cpu() else mlx) - 1
    sizes = {"weights": expected.weights, "loaded": loaded, "cache": 0, "held": 0}
    sizes |= {"total": expected.total, "mlx": mlx, "rss": process}
    return {name: size / MIB for name, size in sizes.items()} | {"off": 100 * is_off}


def with_full_cache(expected: Estimate, source: str, tokens: int) -> Estimate:
    """The estimate with the KV cache of all sequences, which claim it as they grow."""
    architecture = inspect_architecture(sources.checkpoint_metadata(source).config)
    value_bytes = 4 if device.is_cpu() else 2
    return replace(expected, cache=architecture.cache_values(tokens, SEQUENCES) * value_bytes)


def answer(batch: Any, *, sequences: int, prompt: int) -> int:
    """Generate the answers of `sequences` at once. prompt: tokens of each. Returns the bytes of arrays at the end."""
    for n in range(sequences):
        batch.insert([Sequence(n, tuple(range(3, 3 + prompt)), SamplingParams(temperature=0.0), ANSWER)])
    generated = 0
    while generated < sequences * ANSWER:
        generated += len(batch.decode())
        batch.prefill()
    held = device.active_bytes()
    batch.remove(range(sequences))
    return held


def see(runner: Any, pictures: int, dim: int) -> int:
    """Answer a request for each of so many pictures. Returns the bytes that are kept of them. dim: of embeddings."""
    ids = itertools.count(1000)
    pixels = features = 0
    for seed in range(pictures):
        file = io.BytesIO()
        picture(seed, SIDE, SIDE).save(file, "PNG")  # type: ignore[no-untyped-call]
        message = Message("user", (Image(file.getvalue(), "messages[0]"), Text("What is it?")), "messages[0]")
        request = GenerationRequest(ChatPrompt((message,)), {"temperature": 0.0}, max_tokens=ANSWER, ignore_eos=True)
        prepared = runner.preprocess(request)
        (seen,) = prepared.formatted.images
        pixels += sum(array.nbytes for array in seen.image.inputs.values())
        features += seen.image.tokens * dim * (4 if device.is_cpu() else 2)
        ((sequence, _),) = runner.prepare(prepared, ids)
        runner.batch.insert([sequence])
        generated = 0
        while generated < ANSWER:
            generated += len(runner.batch.decode())
            runner.batch.prefill()
        runner.batch.remove([sequence.id])
    return min(pixels, PIXEL_BYTES) + min(features, FEATURE_BYTES)


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
    parser.add_argument("--tiny", action="store_true", help="the zoo as small as it is")
    parser.add_argument(
        "--tokens", type=int, help=f"of the context, and of the cache ({TOKENS}; 4096 where pictures take more)"
    )
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"that a vision model sees ({PICTURES})")
    parser.add_argument("--one", action="store_true", help="measure a single source here and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        one = arguments.sources[0]
        makes_text = sources.known_kind(one) in ("text", "vision")
        tokens = arguments.tokens or TOKENS
        measured = measure(one, tokens, arguments.pictures) if makes_text else measure_encoder(one)
        print(json.dumps(measured))
        return 0
    print(
        f"{'MiB':<18}{'weights':>9}{'loaded':>9}{'cache':>9}{'held':>9}   {'estimate':>9}{'MLX':>9}{'RSS':>9}{'off':>8}"
    )
    for name in arguments.sources or ["embedded:smollm2", *LLAMAS, *ZOO, *VISION, "embedded:minilm", *ENCODERS]:
        with tempfile.TemporaryDirectory() as directory:
            source: str | Path = name
            if name in ENCODERS:
                write, family, config = ENCODERS[name]
                source = write(Path(directory) / "m", *family, **config)
            elif name in VISION:
                fields = VISION[name] | {"text": _SEEN_TEXT | VISION[name].get("text", {})}
                source = tiny_vision(Path(directory) / "m", name, **fields)  # type: ignore[no-untyped-call]
            elif name in LLAMAS or name in ZOO:
                source = write_model(Path(directory) / "m", config_of(name, is_tiny=arguments.tiny))
            tokens = arguments.tokens or LONGER.get(name, TOKENS)
            command = [sys.executable, "-m", "tools.measure_memory", "--tokens", str(tokens)]
            command += ["--pictures", str(arguments.pictures), "--one", str(source)]
            m = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        sizes = "".join(f"{m[part]:>9.1f}" for part in ("weights", "loaded", "cache", "held"))
        totals = "".join(f"{m[part]:>9.1f}" for part in ("total", "mlx", "rss"))
        print(f"{name:<18}{sizes}   {totals}{m['off']:>+7.1f}%", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
