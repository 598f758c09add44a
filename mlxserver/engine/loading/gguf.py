"""GGUF files as MLX directories: converted once, kept in the user's cache directory.

Rule 1: a directory NAME in the cache is complete; it appears by one rename.
Rule 2: a conversion works in NAME.partial under the lock on NAME.lock, which the converter process holds, too: if this
        process is killed, the converter's files stay untouched until it has ended.
Rule 3: NAME changes with the file (path, size, time of change), the converter's version, the wanted format and what is
        corrected afterwards.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from mlxserver.engine.loading import gguf_splits
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.metadata import CheckpointMetadata
from mlxserver.engine.platform.folders import cache_directory
from mlxserver.engine.platform.policy import WeightPolicy

log = logging.getLogger("engine")

# What the converter (gguf_converter.py) is to do and its options, the best format first.
_FLOAT32 = ("gguf2mlx", "--dtype", "float32")
_PRESERVED = ("--dtype", "float16", "--quant-source", "preserve")
_AS_STORED = (("gguf2mlx", *_PRESERVED), ("gguf2mlx", "--dtype", "float16"))
FORMATS = {
    WeightPolicy.FLOAT32: (_FLOAT32,),
    WeightPolicy.QUANTIZED: (("keep-blocks", *_PRESERVED), ("keep-blocks", "--dtype", "float32")),
    WeightPolicy.STORED: _AS_STORED,
    WeightPolicy.BFLOAT16: _AS_STORED,  # dequantized once they are loaded
}
_KEPT = {"Q4_K": 20, "Q8_0": 36}
# Bytes of 32 weights, with scale and bias, in blocks that are kept; others become floats.
KEPT_BLOCKS: dict[WeightPolicy, dict[str, int]] = {
    WeightPolicy.FLOAT32: {},
    WeightPolicy.QUANTIZED: {"Q4_0": 20, "Q4_1": 20, "Q4_K": 24, "Q8_0": 36},
    WeightPolicy.STORED: _KEPT,
    WeightPolicy.BFLOAT16: _KEPT,
}
KEPT_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # of all others every block becomes floats
HALVES = {"F16": 64, "BF16": 64}  # the same for weights of 16 bits, which the kernels of a CPU take of any architecture
CORRECTIONS = 2  # counts up with what correct_tokenizer() changes
WAITING = "waiting: another load converts the same file"
TENSORS_DONE = re.compile(r"(?:Converting|Preserving):.*?(\d+)/(\d+)")


def destination(gguf: Path, weights: WeightPolicy) -> Path:
    """The directory that a GGUF file is, or will be, converted to. Raises OSError."""
    return cache_directory() / _name(gguf, FORMATS[weights])


def checkpoint_metadata(source: str, gguf: Path, weights: WeightPolicy) -> CheckpointMetadata:
    """Metadata from a GGUF file's header. Raises SourceInvalid."""
    from gguf2mlx.gguf2mlx import build_config, detect_architecture  # here, because most processes need neither of them

    from mlxserver.engine.loading.gguf_reader import Reader

    try:
        reader = Reader(gguf)
        architecture = detect_architecture(reader)
        config = build_config(reader, architecture, "float32" if weights.computes_in_float32 else "float16")
    except Exception as error:  # a damaged header can make the reader raise anything
        raise SourceInvalid(source, f"its header can't be read: {type(error).__name__}: {error}") from None
    elements: collections.Counter[str] = collections.Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    return CheckpointMetadata(config, converted_bytes(elements, architecture, weights))


def converted(source: str, gguf: Path, weights: WeightPolicy, progress: Callable[[str, int, int], None]) -> Path:
    """The MLX directory of a GGUF file, converted first if needed. Raises SourceInvalid.

    The first of FORMATS that the converter supports for this model is taken.
    """
    try:
        target = destination(gguf, weights)
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_beside(target, ".lock"), lambda: progress(WAITING, 0, 0)) as lock:
            if not target.is_dir():
                progress("converting", 0, 0)
                _remove_leftovers(target.parent)
                _convert(gguf, target, FORMATS[weights], lock, progress)
    except (OSError, _ConverterFailed) as error:
        raise SourceInvalid(source, f"it could not be converted: {error}") from None
    return target


def converted_bytes(elements: Mapping[str, int], architecture: str, weights: WeightPolicy) -> int:
    """Bytes of a model after the conversion. elements: number of its weights by their type in the file."""
    kept = KEPT_BLOCKS[weights] if architecture in KEPT_ARCHITECTURES else {}
    kept = kept | HALVES if weights is WeightPolicy.QUANTIZED else kept
    each = 4 if weights.computes_in_float32 else 2
    return sum(count * kept[name] // 32 if name in kept else count * each for name, count in elements.items())


class _ConverterFailed(Exception):
    """A failed conversion, with the converter's message."""


def _name(gguf: Path, formats: tuple[tuple[str, ...], ...]) -> str:
    status = gguf.stat()
    identity = (str(gguf), status.st_size, status.st_mtime_ns, metadata.version("gguf2mlx"), formats, CORRECTIONS)
    return f"{gguf.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the file's lock; gives its descriptor. on_wait: called if it is taken, and then it is waited for; without
    it, BlockingIOError is raised.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _remove_leftovers(cache: Path) -> None:
    """Delete the files of conversions that were killed; those of running ones are locked."""
    for partial in cache.glob("*.partial"):
        with contextlib.suppress(BlockingIOError), _locked(partial.with_suffix(".lock")):
            shutil.rmtree(partial, ignore_errors=True)


def _convert(
    gguf: Path, target: Path, formats: tuple[tuple[str, ...], ...], lock: int, progress: Callable[[str, int, int], None]
) -> None:
    partial = _beside(target, ".partial")
    try:
        for format in formats:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            failure = _run_converter(gguf, partial / "model", format, lock, progress)
            if failure is None:
                correct_tokenizer(partial / "model")
                (partial / "model").rename(target)
                return
        raise _ConverterFailed(failure)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def correct_tokenizer(model: Path) -> None:
    """Split texts as the GGUF file's tokenizer.ggml.pre means it, where the converter does not know that name."""
    config, tokenizer = model / "tokenizer_config.json", model / "tokenizer.json"
    if not (config.is_file() and tokenizer.is_file()):
        return
    name = json.loads(config.read_text("utf-8")).get("gguf_tokenizer_pre")
    fields = json.loads(tokenizer.read_text("utf-8"))
    if not name or name in gguf_splits.CONVERTED or not gguf_splits.splits_words(fields.get("pre_tokenizer")):
        return
    if (splits := gguf_splits.SPLITS.get(name)) is None:
        log.warning("The way in which this model's tokenizer splits texts, %r, is unknown; tokens may differ.", name)
        return
    fields |= {"normalizer": None, "pre_tokenizer": gguf_splits.pre_tokenizer(splits)}
    fields["model"]["ignore_merges"] = name in gguf_splits.IGNORE_MERGES
    tokenizer.write_text(json.dumps(fields, ensure_ascii=False), "utf-8")


def _run_converter(
    gguf: Path, output: Path, format: tuple[str, ...], lock: int, progress: Callable[[str, int, int], None]
) -> str | None:
    """Convert in a process of its own, which keeps its memory and output out of ours. Gives its error, or None."""
    form, *options = format
    converter = [sys.executable, "-m", "mlxserver.engine.loading.gguf_converter", form]
    command = [*converter, "--input", str(gguf), "--output", str(output), "--offline", *options]
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": path}
    last_lines: collections.deque[str] = collections.deque(maxlen=3)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
        pass_fds=[lock],
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:  # a progress bar's carriage returns end lines, too
                if tensors := TENSORS_DONE.search(line):
                    progress("converting", int(tensors[1]), int(tensors[2]))
                elif line.strip():
                    last_lines.append(line.strip().removeprefix("❌ "))
        except BaseException:  # the load was aborted
            process.kill()
            raise
    if process.returncode == 0 and (output / "config.json").is_file():
        return None
    return " / ".join(last_lines) or f"the converter ended with status {process.returncode}"
