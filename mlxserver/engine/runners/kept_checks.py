"""Outcomes of self-checks, kept in files between loads and processes.

Rule 1: a file's name is a hash of all that its outcome depends on: device, shape of the model, versions, paths checked.
Rule 2: what can't be read is checked anew; what can't be written is not kept (kept_files.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import mlxserver.engine.mlx

from mlx.utils import tree_flatten

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.metadata import model_arguments
from mlxserver.engine.platform import device
from mlxserver.engine.platform.kept_files import KeptFiles
from mlxserver.engine.platform.policy import CacheKind, ExecutionPolicy, PromptSharing


@dataclass(frozen=True, slots=True)
class Outcome:
    """Paths that a model can take, in the fields of its policy. reasons: why the others were turned off."""

    compile_steps: bool
    pad_slots: bool
    bucket_prefill: bool
    prompts: PromptSharing
    batch_cache: CacheKind
    reasons: tuple[str, ...] = ()
    bucket_attention: bool = False
    fuse_layers: bool = False
    verifies: bool = True

    @staticmethod
    def of(policy: ExecutionPolicy, *reasons: str) -> Outcome:
        """The outcome that a policy shows."""
        return Outcome(**{name: getattr(policy, name) for name in _PATHS}, reasons=tuple(dict.fromkeys(reasons)))

    @staticmethod
    def parse(text: bytes) -> Outcome:
        """The outcome in a file. Raises ValueError, KeyError or TypeError if there is none in it."""
        stated = json.loads(text)
        for name, allowed in _PATHS.items():
            if type(stated[name]) is not type(allowed[0]) or stated[name] not in allowed:
                raise ValueError(f"{name} is {stated[name]!r}")
        if not isinstance(stated["reasons"], list):
            raise TypeError("reasons is no list")
        return Outcome(**{name: stated[name] for name in _PATHS}, reasons=tuple(map(str, stated["reasons"])))

    def applied_to(self, policy: ExecutionPolicy) -> ExecutionPolicy:
        """The policy with these paths."""
        return replace(policy, **{name: getattr(self, name) for name in _PATHS})


_PATHS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("compile_steps", "pad_slots", "bucket_prefill", "bucket_attention", "fuse_layers", "verifies"), (False, True)
    ),
    "prompts": get_args(PromptSharing),
    "batch_cache": get_args(CacheKind),
}


class KeptChecks:
    """Files of outcomes in a directory, which several processes may share (kept_files.py)."""

    def __init__(self, directory: Path, most: int = 256) -> None:
        self._files = KeptFiles(directory, most)

    def find(self, name: str) -> Outcome | None:
        """The outcome of this name (check_name()), if there is one."""
        return self._files.read(name, Outcome.parse)

    def store(self, name: str, outcome: Outcome) -> None:
        """Keep an outcome, in place of an earlier one."""
        self._files.write(name, asdict(outcome))


def check_name(model: Any, policy: ExecutionPolicy, code: str = "") -> str:
    """Name of what a model's self-check finds out under a policy. Weights are left out: it is about shapes.

    code: version of all that computes; by default the present one.
    """
    digest = hashlib.sha256((code or code_version()).encode())
    for part in (device.describe(), sorted(environment()), policy, *_shape(model)):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:40]


def _shape(model: Any) -> Iterator[object]:
    """Class, KV format and arguments of a model, its modules with their quantization, the shapes of its parameters."""
    yield type(model)
    yield caches.kv_format(model)
    yield from ([*arguments.items()] for arguments in model_arguments(model))
    for name, module in model.named_modules():
        yield name, type(module), *(getattr(module, own, None) for own in ("bits", "group_size", "mode"))
    for name, array in tree_flatten(model.parameters()):
        yield name, array.shape, array.dtype


def environment() -> Iterator[tuple[str, str]]:
    """Variables that choose MLX's kernels."""
    for name, value in os.environ.items():
        if name.startswith("MLX_") and not name.startswith("MLX_SERVER_") and not name.endswith("_DIR"):
            yield name, value


@functools.cache
def code_version() -> str:
    """Versions of MLX, of mlx-lm and of the engine, and a hash of the engine's sources."""
    digest = hashlib.sha256()
    for file in sorted((Path(mlxserver.__file__).parent / "engine").rglob("*.py")):
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return f"{metadata.version('mlx')} {metadata.version('mlx-lm')} {mlxserver.__version__} {digest.hexdigest()}"
