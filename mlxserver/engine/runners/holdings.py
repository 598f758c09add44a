"""What a model has of the prefix cache and of the pool, opened for its scheduler.

Rule: the scheduler closes it, or the end of the block if that fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache.caches import cache_sizes
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes, PrefixCache
from mlxserver.engine.kv_pool import KVAccount, KVPool
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.kv_budget import block_bytes


class _Closable(Protocol):
    def close(self) -> None:
        """Give it back."""


@contextmanager
def prefixes(cache: PrefixCache, spec: ModelSpec, loaded: LoadedModel) -> Iterator[ModelPrefixes | None]:
    """The model's prefixes; None where it keeps none."""
    if not spec.prefix_cache_bytes:
        yield None
        return
    opened = cache.open(model_identity(spec, loaded), spec.prefix_cache_bytes, spec.key)
    with _closed_on_failure(opened):
        yield opened


@contextmanager
def draft_prefixes(cache: PrefixCache, spec: ModelSpec, draft: DraftModel | None) -> Iterator[DraftModel | None]:
    """The draft model with its prefixes, if it has any."""
    if draft is None or draft.identity is None or not spec.prefix_cache_bytes:
        yield draft
        return
    opened = cache.open(draft.identity, spec.prefix_cache_bytes, draft.key)
    with _closed_on_failure(opened):
        yield replace(draft, prefixes=opened)


@contextmanager
def account(pool: KVPool, spec: ModelSpec, loaded: LoadedModel, draft: DraftModel | None) -> Iterator[KVAccount]:
    """The model's account in the pool, with room for a draft model's KV cache."""
    sizes = cache_sizes(loaded.model)
    sizes = sizes.with_draft(draft.model) if draft else sizes
    opened = pool.open(spec.key, block_bytes(sizes, loaded.limits.reserved, loaded.limits.sequences))
    with _closed_on_failure(opened):
        yield opened


@contextmanager
def _closed_on_failure(opened: _Closable) -> Iterator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise
