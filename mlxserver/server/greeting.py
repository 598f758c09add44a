"""First screen: what is printed once the server is ready. Plain lines; a terminal's width cuts those of models."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineError
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.manager.instance import ModelInstance
from model_manager import ModelManager

QUESTION = "What is the capital of France?"
ROOT = Path(__file__).parents[2]


def greeting(url: str, manager: ModelManager, estimate: Callable[[ModelSpec], Estimate]) -> str:
    """The server's URL, its models with what fits, and lines to try. Blocks: an estimate reads files."""
    models = _columns([_model_row(instance, manager, estimate) for instance in manager.instances])
    budget = f"{_size(manager.memory.reserved)} of {_size(manager.memory.budget)} in use"
    page = [f"In a browser: {url}/"] if manager.settings.page else []
    head = ["", f"Serving on {url}", *page, "", f"Models ({budget}):"]
    return "\n".join([*head, *(models or ["  none"]), "", "Try:", *_lines_to_try(url, manager), ""])


def _model_row(
    instance: ModelInstance, manager: ModelManager, estimate: Callable[[ModelSpec], Estimate]
) -> tuple[str, ...]:
    memory = _size(instance.reserved_bytes) if instance.is_loaded else _fit(instance.spec, manager, estimate)
    return instance.key, instance.status, memory, instance.spec.source


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row, with the cells of a column below each other; not longer than a terminal is wide."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(("", *map(str.ljust, row, widths))).rstrip() for row in rows]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else max(map(len, lines), default=0)
    return [line if len(line) <= room else f"{line[: room - 1]}…" for line in lines]


def _fit(spec: ModelSpec, manager: ModelManager, estimate: Callable[[ModelSpec], Estimate]) -> str:
    """Whether a model that is not loaded fits, if that is known without the network."""
    try:
        if sources.is_repository(spec.source):
            directory = sources.local_directory(spec.source)
            if directory is None:
                return "downloaded when asked for"
            spec = replace(spec, source=str(directory))  # or else the hub would be asked
        needed = estimate(spec).total
    except EngineError:
        return "can't be loaded"
    if needed > manager.memory.budget:
        return f"{_size(needed)}: does not fit"
    if needed > manager.memory.budget - manager.memory.reserved:
        return f"{_size(needed)}: fits in place of others"
    return f"{_size(needed)}: fits"


def _lines_to_try(url: str, manager: ModelManager) -> list[str]:
    """A line for curl and one for each client."""
    loaded = [instance.key for instance in manager.instances if instance.is_loaded]
    key = next(iter(loaded or manager.keys), "KEY")
    body = f'{{"model":"{key}","messages":[{{"role":"user","content":"{QUESTION}"}}],"temperature":0}}'
    is_checkout = (ROOT / "Makefile").is_file()
    python = _relative(sys.executable)
    simple, advanced = (
        (f"{python} simple_client.py", f"{python} advanced_client.py") if is_checkout else ("mlx-chat", "mlx-shell")
    )
    address = "" if url == "http://127.0.0.1:8000" else f" --base-url {url}"
    model = "" if key in loaded[:1] else f" --model {key}"
    return [
        f"  curl -s {url}/v1/chat/completions -d '{body}'",
        f'  {simple}{address}{model} --temperature 0 "{QUESTION}"',
        f"  {advanced}{address}{model}",
    ]


def _relative(program: str) -> str:
    """The path of a program as it is typed in the checkout."""
    path = Path(program)
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 10**8 else f"{number / 1e6:.0f} MB"
