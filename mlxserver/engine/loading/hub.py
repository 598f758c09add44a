"""Models from the Hugging Face hub, in the cache of huggingface_hub.

Rule 1: a complete snapshot on this machine is used when the hub can't be reached.
Rule 2: nothing is printed; progress is reported in bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import httpx

from mlxserver.config.settings import Kind
from mlxserver.engine.errors import LoadAborted, one_line
from mlxserver.engine.loading import kinds
from mlxserver.engine.loading.download.download import Download, NoSpace, Report, check_disk, fetch_now, list_files
from mlxserver.engine.loading.download.manifest import Manifest
from mlxserver.engine.loading.download.transfer import Busy, DigestWrong
from mlxserver.engine.loading.errors import DiskFull, HubUnavailable, SourceInvalid
from mlxserver.engine.loading.metadata import CheckpointMetadata, has_head, read_config, text_bytes

log = logging.getLogger("models")

WEIGHTS = "model*.safetensors"
DENSE_WEIGHTS = "*_Dense/model*.safetensors"  # of embedding models: layers behind the pooling
NO_CONFIG = "the repository has no config.json; expected a model for mlx-lm"
REACH = "could not be fetched from the Hugging Face hub"
STAYS = "What has arrived stays, and the same command goes on from there"
REFUSALS = (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)


_listed: dict[tuple[str, str | None], Manifest | None] = {}  # manifests of the pulls that are being planned


@contextlib.contextmanager
def listing(source: str, repository: str, revision: str | None) -> Iterator[Manifest | None]:
    """The manifest of a model, for which the hub is not asked again meanwhile; None as of a copy from before.

    Raises SourceInvalid.
    """
    key = repository, revision
    _listed[key] = manifest = _manifest(source, repository, revision)
    try:
        yield manifest
    finally:
        _listed.pop(key, None)


def snapshot(
    source: str, repository: str, revision: str | None, progress: Report, manifest: Manifest | None = None
) -> Path:
    """The local directory of a repository's model files, downloaded if needed. manifest: of it, if it is known.

    Raises SourceInvalid.
    """
    try:
        if manifest := manifest or _manifest(source, repository, revision):
            return Download(manifest.named(*_file_patterns())).run(progress)
        options = {"allow_patterns": _file_patterns(), "local_files_only": True}
        directory = Path(snapshot_download(repository, revision=revision, **options))
    except (LoadAborted, SourceInvalid):
        raise
    except Exception as error:
        raise failure(source, error, revision) from None
    if not (directory / "config.json").is_file():
        raise SourceInvalid(source, NO_CONFIG)
    return directory


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The directory of a repository's files that were downloaded before; None without a config.json in it."""
    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def checkpoint_metadata(source: str, repository: str, revision: str | None) -> CheckpointMetadata:
    """Metadata from a repository's config.json and list of files, without its weights. Raises SourceInvalid."""
    try:
        if manifest := _manifest(source, repository, revision):
            return _remote_metadata(repository, manifest)
        directory = cached_snapshot(repository, revision)
        if directory is None:
            raise HubUnavailable(source, _unreachable())
        config = read_config(directory / "config.json")
    except SourceInvalid:
        raise
    except Exception as error:
        raise failure(source, error, revision) from None
    files = [*directory.glob(WEIGHTS)]
    stored = sum(map(text_bytes, files))
    modules = directory / kinds.MODULES
    kind = _kind(repository, config, modules if modules.is_file() else None, kinds.has_processor(directory))
    towers = sum(file.stat().st_size for file in files) - stored
    return CheckpointMetadata(config, stored, kind, towers, has_head(config, files))


def _remote_metadata(repository: str, manifest: Manifest) -> CheckpointMetadata:
    config_file, modules = manifest.find("config.json"), manifest.find(kinds.MODULES)
    assert config_file
    config = read_config(fetch_now(manifest, config_file))
    files = manifest.named(WEIGHTS).files
    stored = sum(text_bytes(link) if (link := manifest.link(file)).is_file() else file.size for file in files)
    has_processor = any(manifest.find(name) for name in kinds.PROCESSORS)
    kind = _kind(repository, config, fetch_now(manifest, modules) if modules else None, has_processor)
    towers = sum(file.size for file in files) - stored
    return CheckpointMetadata(config, stored, kind, towers, has_head(config, map(manifest.link, files)))


def known_kind(repository: str, revision: str | None) -> Kind | None:
    """The kind of a repository's model, if the files that tell it are in the cache. No network. Raises ValueError."""
    directory = cached_snapshot(repository, revision)
    if directory is None:
        return None
    modules = try_to_load_from_cache(repository, kinds.MODULES, revision=revision)
    if modules is None and not any(directory.glob(WEIGHTS)):
        return None  # its other files are not here
    config = read_config(directory / "config.json")
    known_modules = Path(modules) if isinstance(modules, str) else None
    return _kind(repository, config, known_modules, kinds.has_processor(directory))


def _kind(repository: str, config: Mapping[str, Any], modules: Path | None, has_processor: bool) -> Kind:
    """The kind of a repository's model. modules: its modules.json, None where there is none. has_processor: of
    images.
    """
    pools = modules is not None and kinds.names_pooling(modules)
    ranks = kinds.is_named_reranker(repository) or (modules is not None and kinds.names_scoring(modules))
    return kinds.find_kind(config, pools=pools, ranks=ranks, has_processor=has_processor)


def cache() -> Path:
    """The folder that repositories are downloaded to."""
    return Path(constants.HF_HUB_CACHE)


def missing_bytes(source: str, manifest: Manifest | None) -> int:
    """Bytes that snapshot() would download; 0 where the hub can't be reached.

    Raises SourceInvalid, also if they do not fit on the disk.
    """
    if manifest is None:
        return 0
    wanted = manifest.named(*_file_patterns())
    try:
        check_disk(wanted)
    except NoSpace as error:
        raise failure(source, error, None) from None
    return wanted.missing_bytes


def _manifest(source: str, repository: str, revision: str | None) -> Manifest | None:
    """The manifest of a model; None where the hub can't be reached and there is a copy. Raises SourceInvalid."""
    if (repository, revision) in _listed:
        return _listed[repository, revision]
    try:
        manifest = list_files(repository, revision)
    except Exception as error:
        if not isinstance(error, REFUSALS) and cached_snapshot(repository, revision):
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(error)
            log.warning("%s: the hub can't be asked (%s); the copy from before is used", source, reason)
            return None
        raise failure(source, error, revision) from None
    if manifest.find("config.json") is None:
        raise SourceInvalid(source, NO_CONFIG)
    return manifest


def _file_patterns() -> list[str]:
    """Patterns of the files that mlx-lm loads, without code, which is never run."""
    import mlxserver.engine.mlx  # noqa: F401  (here, because the manager checks sources without MLX)

    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return [*(pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != "*.py"), DENSE_WEIGHTS]


def failure(source: str, error: Exception, revision: str | None) -> SourceInvalid:
    """The reason of an error, and what would help."""
    match error:
        case errors.GatedRepoError():
            return SourceInvalid(source, "access is restricted: accept its terms on the hub and set HF_TOKEN")
        case errors.RevisionNotFoundError():
            return SourceInvalid(source, f"the repository has no revision {revision!r}")
        case errors.RepositoryNotFoundError():
            return SourceInvalid(source, "no such repository on the hub (or a private one: set HF_TOKEN)")
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return SourceInvalid(source, "the hub does not take the token: set HF_TOKEN to a valid one")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return HubUnavailable(source, _unreachable())
        case NoSpace():
            return DiskFull(source, str(error))
        case OSError(errno=errno.ENOSPC):
            return DiskFull(source, f"the disk of {cache()} is full. {STAYS}")
        case DigestWrong():
            return HubUnavailable(source, f"{error}; the same command tries again")
        case Busy():
            return HubUnavailable(source, f"{error}. {STAYS}")
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return HubUnavailable(source, f"{REACH}, which answered with status {status}; try again later")
        case httpx.TransportError():
            return HubUnavailable(source, _unreachable())
        case _:  # the hub's and the transport's errors are of many kinds
            return HubUnavailable(source, f"{REACH}: {one_line(error)}")


def _unreachable() -> str:
    if constants.HF_HUB_OFFLINE:
        return f"{REACH}: HF_HUB_OFFLINE is set, and there is no copy downloaded before"
    return f"{REACH} ({constants.ENDPOINT}); expected a network connection, or a copy downloaded before"
