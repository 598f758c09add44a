"""Removal of a model's files from the folder where they are kept, as the program that put them there would do it.

Rule: nothing outside that folder is touched: of a link only the link is removed, of a model's directory only its files,
and the directory itself once it is empty.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.library.scan import LocalModel


def remove(model: LocalModel) -> None:
    """Remove the model. Blocks. Raises SourceInvalid if the system refuses, or a link on its path leads elsewhere."""
    try:
        if model.root != model.top and not model.root.parent.resolve().is_relative_to(model.top.resolve()):
            raise SourceInvalid(model.key, f"it is outside of {model.top}, behind a link; nothing was removed")
        match model.place:
            case "ollama":
                _remove_manifest(model.root)
            case "huggingface" if model.root.is_dir():
                shutil.rmtree(model.root)
            case _ if model.root.is_dir() and not model.root.is_symlink():
                _remove_directory(model.root)
            case _:
                _remove_file(model.root)
    except OSError as error:
        raise SourceInvalid(model.key, f"{error.filename} can't be removed: {error.strerror}") from None


def _remove_directory(path: Path) -> None:
    for file in path.iterdir():
        if file.is_symlink() or file.is_file():
            file.unlink()
    with suppress(OSError):  # it has folders
        path.rmdir()


def _remove_file(path: Path) -> None:
    """Remove a file; of a hub cache, its blob with it."""
    blob = path.resolve()
    path.unlink()
    if blob.parent.name == "blobs" and blob.parent.parent in path.parents:
        blob.unlink(missing_ok=True)


def _remove_manifest(manifest: Path) -> None:
    """Remove a manifest of Ollama's, and the blobs that no other one names."""
    manifests = manifest.parents[3]
    others = (path for path in manifests.glob("*/*/*/*") if path.is_file() and path != manifest)
    kept = {digest for path in others for digest in _digests(path)}
    gone = _digests(manifest) - kept
    manifest.unlink()
    for digest in gone:
        (manifests.parent / "blobs" / Path(digest.replace(":", "-")).name).unlink(missing_ok=True)


def _digests(manifest: Path) -> set[str]:
    """Digests of a manifest's layers and of its configuration; none of a damaged one."""
    try:
        content = json.loads(manifest.read_bytes())
        return {str(layer["digest"]) for layer in (*content["layers"], content.get("config") or {}) if layer}
    except (ValueError, KeyError, TypeError):
        return set()
