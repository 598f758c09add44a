"""Models from the Hugging Face hub, in the cache of huggingface_hub.

Rule 1: a complete snapshot on this machine is used when the hub can't be reached.
Rule 2: nothing is printed; progress is reported in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download, try_to_load_from_cache
from tqdm.auto import tqdm

from mlxserver.config.settings import Kind
from mlxserver.engine.errors import LoadAborted, SourceInvalid
from mlxserver.engine.loading import kinds
from mlxserver.engine.loading.metadata import CheckpointMetadata, read_config

WEIGHTS = "model*.safetensors"
DENSE_WEIGHTS = "*_Dense/model*.safetensors"  # of embedding models: layers behind the pooling
NO_CONFIG = "the repository has no config.json; expected a model for mlx-lm"
REACH = "could not be fetched from the Hugging Face hub"


def snapshot(source: str, repository: str, revision: str | None, progress: Callable[[str, int, int], None]) -> Path:
    """The local directory of a repository's model files, downloaded if needed. Raises SourceInvalid."""
    try:
        directory = snapshot_download(
            repository, revision=revision, allow_patterns=_file_patterns(), tqdm_class=_byte_reporter(progress)
        )
    except LoadAborted:
        raise
    except Exception as error:
        raise SourceInvalid(source, _explain(error, revision)) from None
    if not Path(directory, "config.json").is_file():
        raise SourceInvalid(source, NO_CONFIG)
    return Path(directory)


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The directory of a repository's files that were downloaded before; None without a config.json in it."""
    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def checkpoint_metadata(source: str, repository: str, revision: str | None) -> CheckpointMetadata:
    """Metadata from a repository's config.json and list of files, without its weights. Raises SourceInvalid."""
    try:
        file = Path(hf_hub_download(repository, "config.json", revision=revision))
        config = read_config(file)
    except errors.EntryNotFoundError as error:
        is_missing = not isinstance(error, errors.LocalEntryNotFoundError)
        raise SourceInvalid(source, NO_CONFIG if is_missing else _explain(error, revision)) from None
    except Exception as error:
        raise SourceInvalid(source, _explain(error, revision)) from None
    kind = _kind(repository, config, _modules(repository, revision))
    return CheckpointMetadata(config, _stored_bytes(repository, revision, file.parent), kind)


def known_kind(repository: str, revision: str | None) -> Kind | None:
    """The kind of a repository's model, if the files that tell it are in the cache. No network. Raises ValueError."""
    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    modules = try_to_load_from_cache(repository, kinds.MODULES, revision=revision)
    if not isinstance(config, str) or modules is None:
        return None
    return _kind(repository, read_config(Path(config)), Path(modules) if isinstance(modules, str) else None)


def _kind(repository: str, config: Mapping[str, Any], modules: Path | None) -> Kind:
    """The kind of a repository's model. modules: its modules.json, None where there is none."""
    pools = modules is not None and kinds.names_pooling(modules)
    ranks = kinds.is_named_reranker(repository) or (modules is not None and kinds.names_scoring(modules))
    return kinds.find_kind(config, pools=pools, ranks=ranks)


def _modules(repository: str, revision: str | None) -> Path | None:
    """A repository's modules.json; None where there is none, or that can't be found out."""
    try:
        return Path(hf_hub_download(repository, kinds.MODULES, revision=revision))
    except Exception:  # there is no such file, or no network
        return None


def cache() -> Path:
    """The folder that repositories are downloaded to."""
    return Path(constants.HF_HUB_CACHE)


def missing_bytes(source: str, repository: str, revision: str | None) -> int:
    """Bytes that snapshot() would download; 0 where the hub can't be reached. Raises SourceInvalid."""
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except errors.HfHubHTTPError as error:
        raise SourceInvalid(source, _explain(error, revision)) from None
    except Exception:  # no network, or offline: what was downloaded before can be used
        return 0
    patterns = _file_patterns()
    wanted = [file for file in info.siblings or () if any(fnmatch(file.rfilename, each) for each in patterns)]
    missing = (each for each in wanted if not try_to_load_from_cache(repository, each.rfilename, revision=info.sha))
    return sum(file.size or 0 for file in missing)


def _file_patterns() -> list[str]:
    """Patterns of the files that mlx-lm loads, without code, which is never run."""
    import mlxserver.engine.mlx  # noqa: F401  (here, because the manager checks sources without MLX)

    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return [*(pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != "*.py"), DENSE_WEIGHTS]


def _stored_bytes(repository: str, revision: str | None, snapshot: Path) -> int:
    """Size of the weights on the hub, or else of the downloaded ones."""
    try:
        siblings = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or ()
    except Exception:  # no network, or the hub is down: only downloaded files can be loaded then
        return sum(weights.stat().st_size for weights in snapshot.glob(WEIGHTS))
    return sum(file.size or 0 for file in siblings if fnmatch(file.rfilename, WEIGHTS))


def _explain(error: Exception, revision: str | None) -> str:
    """The reason of an error, and what would help."""
    match error:
        case errors.GatedRepoError():
            return "access is restricted: accept its terms on the hub and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision!r}"
        case errors.RepositoryNotFoundError():
            return "no such repository on the hub (or a private one: set HF_TOKEN)"
        case errors.LocalEntryNotFoundError():
            return f"{REACH}; expected a network connection, or a copy downloaded before"
        case _:  # the hub's and the transport's errors are of many kinds
            return f"{REACH}: {' '.join(str(error).split()) or type(error).__name__}"


def _byte_reporter(progress: Callable[[str, int, int], None]) -> type[Any]:
    """A tqdm class that draws nothing and reports the bytes written to disk."""

    class ByteReporter(tqdm):  # type: ignore[misc,type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            with Path(os.devnull).open("w") as nowhere:
                super().__init__(*args, **{**options, "file": nowhere, "leave": False})

        def display(self, *args: Any, **options: Any) -> None:
            if self.unit == "B" and str(self.desc).startswith("Reconstruct"):
                progress("downloading", int(self.n), int(self.total or 0))

        def refresh(self, *args: Any, **options: Any) -> bool:
            self.display()  # without tqdm's lock, which would stay held when the progress aborts the load
            return True

        def close(self) -> None:
            self.disable = True

    return ByteReporter
