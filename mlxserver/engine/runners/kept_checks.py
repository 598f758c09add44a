"""Outcomes of self-checks, kept in files between loads and processes.

Rule 1: a file's name is a hash of all that its outcome depends on: device, shape of the model, versions, paths checked.
Rule 2: a file is written whole or not at all. What can't be read is checked anew; what can't be written is not kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
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
from mlxserver.engine.platform.policy import CacheKind, ExecutionPolicy, PromptSharing

log = logging.getLogger("engine")


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
    **dict.fromkeys(("compile_steps", "pad_slots", "bucket_prefill", "bucket_attention"), (False, True)),
    "prompts": get_args(PromptSharing),
    "batch_cache": get_args(CacheKind),
}


class KeptChecks:
    """Files of outcomes in a directory, which several processes may share.

    most: files, of some hundred bytes each; those of other versions are never looked for again.
    """

    def __init__(self, directory: Path, most: int = 256) -> None:
        self._directory = directory
        self._most = most

    def find(self, name: str) -> Outcome | None:
        """The outcome of this name (check_name()), if there is one."""
        try:
            return Outcome.parse(self._file(name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.debug("%s is left out: %s", self._file(name), error)
            return None

    def store(self, name: str, outcome: Outcome) -> None:
        """Keep an outcome, in place of an earlier one."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._directory, suffix=".part", delete=False) as file:
                written = Path(file.name)
                try:
                    json.dump(asdict(outcome), file)
                    file.close()
                    written.replace(self._file(name))
                except BaseException:
                    written.unlink(missing_ok=True)
                    raise
            self._drop_oldest()
        except OSError as error:
            log.debug("The outcome of a self-check is not kept: %s", error)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _drop_oldest(self) -> None:
        files = list(self._directory.iterdir())
        for file in sorted(files, key=_changed)[: max(0, len(files) - self._most)]:
            file.unlink(missing_ok=True)


def check_name(model: Any, policy: ExecutionPolicy, code: str = "") -> str:
    """Name of what a model's self-check finds out under a policy. Weights are left out: it is about shapes.

    code: version of all that computes; by default the present one.
    """
    digest = hashlib.sha256((code or _code()).encode())
    for part in (device.describe(), sorted(_environment()), policy, *_shape(model)):
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


def _environment() -> Iterator[tuple[str, str]]:
    """Variables that choose MLX's kernels."""
    for name, value in os.environ.items():
        if name.startswith("MLX_") and not name.startswith("MLX_SERVER_") and not name.endswith("_DIR"):
            yield name, value


@functools.cache
def _code() -> str:
    """Versions of MLX, of mlx-lm and of the engine, and a hash of the engine's sources."""
    digest = hashlib.sha256()
    for file in sorted((Path(mlxserver.__file__).parent / "engine").rglob("*.py")):
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return f"{metadata.version('mlx')} {metadata.version('mlx-lm')} {mlxserver.__version__} {digest.hexdigest()}"


def _changed(file: Path) -> float:
    """Time of a file's last change; the earliest if it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
