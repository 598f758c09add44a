"""Identity of a loaded model, for the prefix cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import mlxserver.engine.mlx  # noqa: F401  (prepares the process before MLX is imported)

from mlx.utils import tree_flatten

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.loading.mtp import has_head


def model_identity(spec: ModelSpec, loaded: LoadedModel) -> ModelIdentity:
    """Identity of a model by its files as they are on disk, its adapter's, and its formats in memory."""
    dtypes = {str(array.dtype) for _, array in tree_flatten(loaded.model.parameters())}
    layers = {type(layer).__name__ for layer in caches.flat(caches.new_cache(loaded.model))}
    kv = caches.kv_format(loaded.model)
    return ModelIdentity(
        files=_fingerprint(loaded.path),
        adapter=_fingerprint(Path(spec.adapter).expanduser()) if spec.adapter else "",
        weights=" ".join(sorted(dtypes)),
        kv_format=" ".join([*sorted(layers), *([str(kv)] if kv else []), *(["mtp"] if has_head(loaded.model) else [])]),
    )


def _fingerprint(directory: Path) -> str:
    """Hash of the path, and of the name, size and time of change of every file in it; a new one if they are gone."""
    digest = hashlib.sha256(str(directory.resolve()).encode())
    try:
        for file in sorted(directory.iterdir()):
            status = file.stat()
            digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    except OSError:
        digest.update(os.urandom(16))
    return digest.hexdigest()
