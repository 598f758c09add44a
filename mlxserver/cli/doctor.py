"""`mlx-server doctor`: the machine, its libraries and a short measurement; what is missing, with the line to type."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.filesize import decimal
from rich.text import Text

from mlxserver import __version__
from mlxserver.client.views import console, wrapped
from mlxserver.config.settings import Settings
from mlxserver.engine.loading import estimate, sources
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.platform import openblas
from mlxserver.engine.platform.folders import cache_directory
from mlxserver.engine.platform.native import build

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "huggingface-hub", "gguf2mlx")
ALONE = ("mlx-vlm",)  # installed without its dependencies, which are not used
MOST_POLICIES = 8  # lines
LEAST_FREE = 10 << 30  # bytes on the disk that models are downloaded to


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: what to do, where something is missing."""

    name: str
    value: str
    remedy: str | None = None


def doctor(options: Namespace, settings: Settings) -> int:
    """Print the report; 1 if something is missing."""
    findings = [*_software(), *_device(settings), *_models(), *_policies(), *_measurement()]
    if options.json:
        print(json.dumps({"findings": [asdict(each) for each in findings]}, indent=2))
    else:
        for each in findings:
            _print(each)
    return 1 if any(each.remedy for each in findings) else 0


def _software() -> Iterator[Finding]:
    yield Finding("server", __version__)
    yield Finding("machine", f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            options = "--no-deps " if name in ALONE else ""
            yield Finding(name, "missing", f"{sys.executable} -m pip install {options}{name}")


def _device(settings: Settings) -> Iterator[Finding]:
    from mlxserver.engine.platform import device  # here, because it starts MLX

    found = device.describe()
    yield Finding("back-end", f"{found.kind}: {found.name}")
    if found.kind != "cpu":
        blas = {"metal": "Metal", "cuda": "cuBLAS"}[found.kind]
        yield Finding("BLAS", blas)
    elif sys.platform == "darwin":
        yield Finding("BLAS", "Accelerate")
    elif openblas.preload():
        yield Finding("BLAS", f"OpenBLAS, {openblas.threads()} threads")
    else:
        remedy = "apt-get install libopenblas0-pthread (Fedora: dnf install openblas-threads)"
        yield Finding("BLAS", "MLX's own, many times slower than OpenBLAS", remedy)
    yield from _kernels()
    budget = estimate.budget(settings.memory_limit)
    yield Finding("memory", f"{decimal(found.memory_bytes)}, of which models may take {decimal(budget)}")


def _kernels() -> Iterator[Finding]:
    from mlxserver.engine.platform.native.extension import native  # here, because it starts MLX

    if not build.is_wanted():
        return
    if kernels := native():
        yield Finding("quantized", f"weights stay as they are stored, native kernels ({kernels.levels()[0]})")
    else:
        yield Finding("quantized", "weights are dequantized to float32, and slower", build.missing())


def _models() -> Iterator[Finding]:
    try:
        sources.check("embedded:smollm2")
        yield Finding("default model", "embedded:smollm2 is installed")
    except SourceInvalid as error:
        yield Finding("default model", "embedded:smollm2 is missing", str(error).partition("type: ")[2] or str(error))
    from huggingface_hub import constants

    for name, path in {"hub's cache": constants.HF_HUB_CACHE, "conversions": cache_directory()}.items():
        yield _disk(name, Path(path))
    yield Finding("hub", f"{constants.ENDPOINT}{', offline' if constants.HF_HUB_OFFLINE else ''}")


def _disk(name: str, path: Path) -> Finding:
    """Free space where a folder is, or will be made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    value = f"{path}, {decimal(free)} free"
    if not os.access(existing, os.W_OK):
        return Finding(name, value, f"make {existing} writable, or set HF_HOME and MLX_SERVER_CACHE to another folder")
    if free < LEAST_FREE:
        value = f"{path}, only {decimal(free)} free"
        return Finding(name, value, "free some space: mlx-server ls shows models, mlx-server rm removes one")
    return Finding(name, value)


def _policies() -> Iterator[Finding]:
    """What was measured on this machine, of the latest models."""
    from mlxserver.engine.loading.kept_choices import CHOICES, KeptChoices

    choices = [each for each in KeptChoices(cache_directory() / CHOICES).all() if each.speedups]
    yield from (Finding("policy", f"{each.device}: {each}") for each in choices[:MOST_POLICIES])
    if not choices:
        yield Finding("policies", "not measured yet: an idle server finds out how its models run fastest here")


def _measurement() -> Iterator[Finding]:
    from mlxserver.engine.platform.measure import measure

    rates = measure()
    yield Finding("products", f"{rates.flops / 1e9:,.0f} GFLOP/s: bounds how fast prompts are read")
    per_second = rates.read_bytes / 1e9
    bound = f"at most {per_second:,.1f} tokens/s of one stream, for 1 GB of weights"
    yield Finding("reading", f"{per_second:,.1f} GB/s: {bound}")


def _print(finding: Finding) -> None:
    terminal = console()
    mark = "missing" if finding.remedy else "ok"
    if not terminal.is_terminal:
        print("\t".join(filter(None, (mark, finding.name, finding.value, finding.remedy))))
        return
    head = f"{mark:<8}{finding.name:<16}"
    line = Text(wrapped(head + finding.value, terminal.width, min(len(head), terminal.width // 4)))
    line.stylize("red" if finding.remedy else "green", 0, len(mark))
    line.stylize("bold", 8, len(head))
    terminal.print(line, soft_wrap=True)
    if finding.remedy:
        terminal.print(Text(f"  → {finding.remedy}", "yellow"), soft_wrap=True)
