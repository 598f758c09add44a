"""Draft model of another one: loaded beside it, and checked to have its vocabulary, and a cache that can be trimmed.

Rule: it is an instance of its own, whatever is loaded under its key: its weights and its KV cache are a part of what is
      estimated and reserved for the model that it drafts for (loading/estimate.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading import loader, mtp
from mlxserver.engine.loading.estimate import counts_draft
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.loading.sources import Progress
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.runners.kept_checks import KeptChecks
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.speculation import is_possible

log = logging.getLogger("engine")


def load_draft(
    spec: ModelSpec,
    loaded: LoadedModel,
    policy: ExecutionPolicy,
    device_policy: ExecutionPolicy,
    kind: Kind,
    progress: Progress,
    kept: KeptChecks | None = None,
) -> DraftModel | None:
    """The draft model of a loaded one, of this kind; None where it would have no use. Raises LoadFailed.

    policy: that of the model that it drafts for. device_policy: what that was estimated with.
    """
    if (drafter := spec.drafter) is None:
        return None
    if kind != "text":
        raise _refusal(spec, f"is of kind {kind}; expected a text model")
    is_useful = counts_draft(spec, device_policy) and policy.may_draft_by_model(spec.speculation)
    if not (is_useful and is_possible(loaded.model, spec.speculation, policy)):
        log.info("%s: its draft %s is not loaded: it would draft nothing here", spec.key, drafter.key)
        return None
    try:
        draft = loader.load(replace(drafter, cache_tokens=None, mtp=False), progress=progress, policy=policy)
        own_policy = fitting_policy(draft.model, policy, drafter.key, kept)
    except LoadFailed as error:
        raise _refusal(spec, f"could not be loaded: {error.cause}") from None
    if difference := _difference(spec, loaded.tokenizer.get_vocab(), draft.tokenizer.get_vocab()):
        raise _refusal(spec, difference)
    if not caches.is_plain(draft.model):
        kinds = sorted({type(layer).__name__ for layer in caches.flat(caches.new_cache(draft.model))})
        raise _refusal(spec, f"has a KV cache that can't be trimmed ({', '.join(kinds)})")
    if own_policy.batch_cache != "slots" or not own_policy.verifies:
        raise _refusal(spec, "can't compute several sequences, or several tokens of one, at once")
    identity = model_identity(drafter, draft)
    return DraftModel(drafter.key, draft.model, draft.limits.context, draft.weight_bytes, own_policy, identity)


def without_idle_head(spec: ModelSpec, loaded: LoadedModel, policy: ExecutionPolicy) -> LoadedModel:
    """The loaded model without its own head (loading/mtp.py) where it would have no use."""
    if not mtp.has_head(loaded.model) or is_possible(loaded.model, spec.speculation, policy):
        return loaded
    log.info("%s: its multi-token prediction head is left out: nothing is drafted here", spec.key)
    mtp.drop_head(loaded.model)
    return replace(loaded, weight_bytes=caches.weight_bytes(loaded.model))


def _refusal(spec: ModelSpec, reason: str) -> LoadFailed:
    return LoadFailed(spec.key, f"its draft {spec.draft!r} {reason}")


def _difference(spec: ModelSpec, target: Mapping[str, int], draft: Mapping[str, int]) -> str | None:
    """What tells two vocabularies apart, token -> id; None if they are equal."""
    if target == draft:
        return None
    if len(target) != len(draft):
        return f"has another vocabulary: {len(draft)} tokens, where {spec.key!r} has {len(target)}"
    targets, drafts = ({id: token for token, id in vocabulary.items()} for vocabulary in (target, draft))
    id = min(id for id in {*targets, *drafts} if targets.get(id) != drafts.get(id))
    return f"has another vocabulary: its token {id} is {drafts.get(id)!r}, where {spec.key!r} has {targets.get(id)!r}"
