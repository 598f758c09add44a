"""Pull of a model: a repository of the Hugging Face hub, downloaded into the hub's cache.

Rule 1: what it takes on disk and in memory is known, and checked, before the first byte of its weights.
Rule 2: what has arrived when a pull ends early stays, and the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import hub, sources
from mlxserver.engine.loading.download.manifest import Manifest
from mlxserver.engine.loading.errors import SourceInvalid, TooLarge
from mlxserver.engine.loading.estimate import Estimate, budget
from mlxserver.engine.loading.sources import Progress, Repository

HUBS = ("https://huggingface.co/", "huggingface.co/", "https://hf.co/", "hf.co/")  # before an id, as people copy it


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull takes, in bytes. needed: memory, None if this version can't load such a model. budget: of all models.

    problem: why it could not be loaded; None if it could. manifest: the files; None where the hub can't be reached.
    """

    source: str
    download_bytes: int
    needed_bytes: int | None
    budget_bytes: int
    problem: str | None = None
    manifest: Manifest | None = None

    @property
    def fits(self) -> bool:
        """Whether memory is large enough for the model."""
        return self.needed_bytes is not None and self.needed_bytes <= self.budget_bytes


def source_of(name: str) -> str:
    """The source of a name: an id, or the address of its page on the hub. Raises SourceInvalid."""
    source = next((name.removeprefix(prefix) for prefix in HUBS if name.startswith(prefix)), name).rstrip("/")
    if not sources.is_repository(source):
        raise SourceInvalid(name, "expected the id of a Hugging Face repository, such as org/name (search finds some)")
    return source


def plan(source: str, memory_limit: int, estimate: Callable[[ModelSpec], Estimate]) -> Plan:
    """The plan of a pull, from the hub's metadata alone. Blocks. Raises SourceInvalid."""
    repository = _repository(source)
    with hub.listing(source, repository.id, repository.revision) as manifest:
        missing = hub.missing_bytes(source, manifest)
        try:
            needed, problem = estimate(ModelSpec(repository.id, source)).total, None
        except LoadFailed as error:
            needed, problem = None, error.cause
    return Plan(source, missing, needed, budget(memory_limit), problem, manifest)


def check(plan: Plan) -> None:
    """Refuse a model that this machine could not load. Raises SourceInvalid, TooLarge."""
    if plan.problem is not None:
        raise SourceInvalid(plan.source, f"{plan.problem} (it can be downloaded with force)")
    if plan.needed_bytes is not None and not plan.fits:
        raise TooLarge(plan.source, plan.needed_bytes, plan.budget_bytes)


def download(plan: Plan, progress: Progress) -> Path:
    """The directory of the model, downloaded. Blocks; what `progress` raises stops it. Raises SourceInvalid."""
    repository = _repository(plan.source)
    return hub.snapshot(plan.source, repository.id, repository.revision, progress, plan.manifest)


def _repository(source: str) -> Repository:
    repository = sources.parse(source)
    assert isinstance(repository, Repository)
    return repository
