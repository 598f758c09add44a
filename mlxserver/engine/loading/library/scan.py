"""Scan of the folders of this machine for models: what is in them, under which names, and what is wrong with it.

Invariants
1. A scan reads headers alone, and those of a file that has not changed once. It never fails: what can't be read has no
   models, or is listed with its fault.
2. No two models have a name in common.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlxserver.engine.loading.library.facts import Facts, Unusable, read_facts
from mlxserver.engine.loading.library.layouts import Candidate, Folder, Place, candidates, folders
from mlxserver.engine.platform.policy import current

LONGEST_NAME = 128
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._:/-]+")
MIN_CONTEXT = 4096  # tokens whose KV cache is reserved with a model by default
COUNTED = (".safetensors", ".gguf", ".json")

Signature = tuple[tuple[str, int, int], ...]  # name, size and time of change of files


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is on this machine.

    key: its full name. alias: a short one, where no other model would have it. path: what a load reads, an MLX
    directory or a GGUF file; root: what is removed with it. top: the folder that was searched. modified: seconds since
    1970. facts: None with a fault.
    """

    key: str
    alias: str | None
    place: Place
    path: Path
    root: Path
    top: Path
    size_bytes: int
    modified: int
    facts: Facts | None
    fault: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the model."""
        return (self.key,) if self.alias is None else (self.key, self.alias)

    @property
    def needed_bytes(self) -> int | None:
        """About what it takes in memory on this device; None with a fault."""
        return self.facts.needed_bytes(current().weights, MIN_CONTEXT) if self.facts else None


class Scanner:
    """Scans folders; keeps the facts of files that do not change."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Signature, Facts | str]] = {}

    def scan(self, model_dirs: Sequence[str]) -> tuple[LocalModel, ...]:
        """The models of this user's folders and model_dirs. Blocks."""
        return self.scan_folders(folders(os.environ, Path.home(), model_dirs))

    def scan_folders(self, searched: Iterable[Folder]) -> tuple[LocalModel, ...]:
        """The models in some folders, each with names of its own. Blocks."""
        unique = {folder.path: folder for folder in searched}.values()
        models = [self._model(each, folder.path) for folder in unique for each in candidates(folder)]
        named = _with_full_names(models)
        self._known = {model.path: self._known[model.path] for model in named if model.path in self._known}
        return tuple(_with_aliases(named))

    def _model(self, candidate: Candidate, top: Path) -> LocalModel:
        signature = _signature(candidate.path)
        facts: Facts | str = candidate.fault or self._facts(candidate.path, signature)
        return LocalModel(
            NOT_IN_NAMES.sub("-", candidate.name)[:LONGEST_NAME],
            None,
            candidate.place,
            candidate.path,
            candidate.root,
            top,
            size_bytes=sum(size for _, size, _ in signature),
            modified=max((changed for *_, changed in signature), default=0) // 10**9,
            facts=facts if isinstance(facts, Facts) else None,
            fault=facts if isinstance(facts, str) else None,
        )

    def _facts(self, path: Path, signature: Signature) -> Facts | str:
        if (known := self._known.get(path)) and known[0] == signature:
            return known[1]
        try:
            facts: Facts | str = read_facts(path)
        except Unusable as error:
            facts = str(error)
        self._known[path] = signature, facts
        return facts


def _signature(path: Path) -> Signature:
    """Of a file, or of a directory's files that tell of the model."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return tuple(_status(file) for file in files if file == path or file.suffix in COUNTED)
    except OSError:
        return ()


def _status(file: Path) -> tuple[str, int, int]:
    try:
        status = file.stat()
    except OSError:  # a link to a file that is missing
        return file.name, 0, 0
    return file.name, status.st_size, status.st_mtime_ns


def _with_full_names(models: Iterable[LocalModel]) -> list[LocalModel]:
    """The models, once each by their paths; of those with one name the first has it, others have their place added."""
    named: dict[str, LocalModel] = {}
    paths: set[Path] = set()
    for model in models:
        real = model.path.resolve()
        if real in paths and model.place != "ollama":  # tags of Ollama's share their blobs
            continue
        paths.add(real)
        keys = (model.key, f"{model.place}/{model.key}", *(f"{model.place}-{n}/{model.key}" for n in range(2, 100)))
        if key := next((key for key in keys if key not in named), None):
            named[key] = replace(model, key=key[:LONGEST_NAME])
    return list(named.values())


def _with_aliases(models: Sequence[LocalModel]) -> Iterator[LocalModel]:
    """The models with their short names: the last part of the full one, where that is unique."""
    shorts = collections.Counter(short_name(model.key) for model in models if model.facts)
    keys = {model.key for model in models}
    for model in models:
        short = short_name(model.key)
        is_unique = model.facts and shorts[short] == 1 and short not in keys
        yield replace(model, alias=short) if is_unique else model


def short_name(key: str) -> str:
    """The last part of a name in small letters; of Ollama's NAME:latest the name."""
    return key.rpartition("/")[2].lower().removesuffix(":latest")


Scan = Callable[[Sequence[str]], tuple[LocalModel, ...]]
