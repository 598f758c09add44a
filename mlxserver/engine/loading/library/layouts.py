"""Layouts of the folders where programs keep models: what may be a model in each, by the name that the program gives.

Rule: folders that do not exist, or can't be read, have no models; nothing raises.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

log = logging.getLogger("models")

Place = Literal["huggingface", "lmstudio", "ollama", "directory"]
DEPTH = 4  # of folders inside each other that are searched
MODEL_LAYER, ADAPTER_LAYER = (f"application/vnd.ollama.image.{name}" for name in ("model", "adapter"))
DEFAULT_HOST, DEFAULT_NAMESPACE = "registry.ollama.ai", "library"
PART = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder with models, and whose it is."""

    place: Place
    path: Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be a model. name: the program's. path: MLX directory or GGUF file. root: what is removed with it.

    fault: why it can't be loaded, where the layout shows that.
    """

    name: str
    place: Place
    path: Path
    root: Path
    fault: str | None = None


def folders(environ: Mapping[str, str], home: Path, model_dirs: Sequence[str]) -> list[Folder]:
    """The folders of this user, in the order in which they are searched. Each program's variables are honoured."""
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(environ.get("HF_HOME") or cache / "huggingface") / "hub"
    hub = Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or hub)
    ollama = Path(environ.get("OLLAMA_MODELS") or home / ".ollama" / "models")
    found = [
        *(Folder("directory", Path(name)) for name in model_dirs),
        Folder("huggingface", hub),
        Folder("lmstudio", home / ".lmstudio" / "models"),
        Folder("lmstudio", home / ".cache" / "lm-studio" / "models"),
        Folder("ollama", ollama),
    ]
    return [Folder(folder.place, folder.path.expanduser()) for folder in found]


def candidates(folder: Folder) -> Iterator[Candidate]:
    """What may be a model in a folder."""
    match folder.place:
        case "huggingface":
            yield from _each(_hub, sorted(folder.path.glob("models--*")))
        case "ollama":
            manifests = folder.path / "manifests"
            yield from _each(lambda manifest: _ollama(folder.path, manifest), sorted(manifests.glob("*/*/*/*")))
        case place:
            yield from _each(lambda path: _local(place, folder.path, path), _folders_below(folder.path))


def _each(find: Callable[[Path], Iterable[Candidate]], paths: Iterable[Path]) -> Iterator[Candidate]:
    """What is found at each of the paths that can be read."""
    for path in paths:
        try:
            yield from find(path)
        except (OSError, ValueError) as error:
            log.debug("%s could not be searched for models: %s", path, error)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _hub(root: Path) -> Iterator[Candidate]:
    """Models of a repository in a hub cache: models--ORG--NAME/{refs,snapshots,blobs}."""
    name = root.name.removeprefix("models--").replace("--", "/")
    snapshot = _snapshot(root)
    if snapshot is None:
        yield Candidate(name, "huggingface", root, root, "it was not downloaded to its end")
    elif (snapshot / "config.json").exists() and not list(snapshot.glob("*.gguf")):
        yield Candidate(name, "huggingface", snapshot, root)
    else:
        yield from _gguf_files(name, "huggingface", snapshot, root)


def _snapshot(root: Path) -> Path | None:
    """The snapshot of the main branch, or else the latest; None without one."""
    snapshots = [path for path in (root / "snapshots").glob("*") if path.is_dir()]
    main = root / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    latest = max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
    return next((path for path in snapshots if path.name == commit), latest)


# -- LM Studio, and any folder ----------------------------------------------------------------------------------------


def _folders_below(top: Path) -> Iterator[Path]:
    """A folder and those in it, once each, without those inside an MLX directory."""
    seen: set[Path] = set()
    pending = [(top, 0)]
    while pending:
        path, depth = pending.pop()
        with suppress(OSError):
            if (real := path.resolve()) in seen or not path.is_dir():
                continue
            seen.add(real)
            yield path
            if depth < DEPTH and not (path / "config.json").exists():
                below = (each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
                pending += [(each, depth + 1) for each in sorted(below, reverse=True)]


def _local(place: Place, top: Path, path: Path) -> Iterator[Candidate]:
    """Models right in a folder, by its path below the top one: publisher/name of LM Studio's."""
    name = path.relative_to(top).as_posix() if path != top else ""
    if (path / "config.json").exists() and not list(path.glob("*.gguf")):
        yield Candidate(name or top.name, place, path, path)
    else:
        yield from _gguf_files(name, place, path, None)


def _gguf_files(name: str, place: Place, path: Path, root: Path | None) -> Iterator[Candidate]:
    """The models of a folder with GGUF files: under its name, or NAME/FILE where there are several."""
    files = [file for file in sorted(path.glob("*.gguf")) if not file.name.lower().startswith("mmproj")]
    parts = [match for file in files if (match := PART.search(file.stem))]
    whole = [file for file in files if not PART.search(file.stem)]
    first = [file for file in files if (match := PART.search(file.stem)) and int(match[1]) == 1]
    is_single = name and len(whole) + len(first) == 1
    for file in whole:
        own = name if is_single else f"{name}/{file.stem}".strip("/")
        yield Candidate(own, place, file, (root if is_single else None) or file)
    for file in first:
        own = name if is_single else f"{name}/{PART.sub('', file.stem)}".strip("/")
        fault = f"it is in {len(parts)} parts; a GGUF file in parts can't be converted"
        yield Candidate(own, place, file, (root if is_single else None) or file, fault)


# -- Ollama -----------------------------------------------------------------------------------------------------------


def _ollama(models: Path, manifest: Path) -> Iterator[Candidate]:
    """The model of manifests/HOST/NAMESPACE/NAME/TAG, whose layers are blobs/sha256-DIGEST."""
    if not manifest.is_file() or manifest.name.startswith("."):
        return
    host, namespace, name, tag = manifest.parts[-4:]
    above = [namespace] if host == DEFAULT_HOST else [host, namespace]
    above = [] if above == [DEFAULT_NAMESPACE] else above
    path, fault = _blob(models, manifest)
    yield Candidate("/".join([*above, f"{name}:{tag}"]), "ollama", path, manifest, fault)


def _blob(models: Path, manifest: Path) -> tuple[Path, str | None]:
    """The weights that a manifest names, and why they can't be loaded."""
    try:
        layers = [(str(each["mediaType"]), str(each["digest"])) for each in json.loads(manifest.read_bytes())["layers"]]
    except (ValueError, KeyError, TypeError):
        return manifest, "its manifest is damaged"
    kinds = dict(layers)
    if MODEL_LAYER not in kinds:
        return manifest, "its manifest names no GGUF file"
    path = models / "blobs" / Path(kinds[MODEL_LAYER].replace(":", "-")).name
    if ADAPTER_LAYER in kinds:
        return path, "it has an adapter in Ollama's format"
    return path, None if path.is_file() else "its weights are missing: it was not downloaded to its end"
