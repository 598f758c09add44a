"""Builds the runners of one process: loads a model, makes its batch, warms it up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine.distributed.batch import LeadingBatch
from mlxserver.engine.distributed.leader import Leader
from mlxserver.engine.errors import LoadFailed, one_line
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.kv_pool import KVAccount, KVPool
from mlxserver.engine.loading import embedding_model, loader, reranker_model, sharding, sources
from mlxserver.engine.loading.kept_choices import KeptChoices
from mlxserver.engine.loading.outcome import complete_or_nothing
from mlxserver.engine.loading.sources import Progress, silent
from mlxserver.engine.loading.unsupported import naming_what_is_missing
from mlxserver.engine.metrics import EngineLoad, ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.runners import holdings
from mlxserver.engine.runners.drafts import load_draft, without_idle_head
from mlxserver.engine.runners.embedding import EmbeddingRunner
from mlxserver.engine.runners.idle_steps import IdleTurns
from mlxserver.engine.runners.kept_checks import KeptChecks
from mlxserver.engine.runners.measured_policies import Measurement
from mlxserver.engine.runners.measured_weights import WeightMeasurement
from mlxserver.engine.runners.model_policy import ModelPolicy, Policies
from mlxserver.engine.runners.rerank import RerankRunner
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.runners.text import TextRunner
from mlxserver.engine.runners.vision import Vision, VisionRunner, load_vision
from mlxserver.engine.sampling.sampler import GREEDY, SAMPLED
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.encoder_batch import Encoder, EncoderBatch
from mlxserver.engine.scheduler.peers import ProcessPeers
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence
from mlxserver.engine.worker.runner import Runner

log = logging.getLogger("engine")

_WARM_UP_TOKENS, _WARM_UP_STEPS = 34, 4


class Builder:
    """Builds the runners of one process, which share its cores and its prefix cache.

    stall_target: seconds that prefill may delay running streams. leader: leads the ranks that share models, if any.
    disk: holds prefixes beyond the process; not those of models that ranks share. pool: memory of KV cache and
    prefixes, None for no limit. kept_checks: outcomes of self-checks. kept_choices: of measured policies, None measures
    none. clock: for measuring.
    """

    def __init__(
        self,
        stall_target: float,
        leader: Leader | None = None,
        policy: ExecutionPolicy | None = None,
        disk: DiskTier | None = None,
        pool: KVPool | None = None,
        kept_checks: KeptChecks | None = None,
        kept_choices: KeptChoices | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool = pool or KVPool()
        self.pool.prefixes.tier = tier = RamTier(policy)
        self.prefix_cache = PrefixCache(tier, disk, self.pool)
        self._policy = policy or current()
        self._stall_target = stall_target
        self._leader = leader
        self._kept_checks = kept_checks
        self.policies = Policies(self._policy, kept_choices)
        self._clock = clock
        self._turns = IdleTurns()
        self._peers = ProcessPeers()

    def build(self, spec: ModelSpec, progress: Progress = silent, metrics: ModelMetrics | None = None) -> Runner:
        """Load a model and warm it up, on the thread that will run it. Raises LoadFailed, or what progress raises."""
        return RUNNERS[spec.kind or _find_kind(spec, progress)](self, spec, progress, metrics)

    def build_text(self, spec: ModelSpec, progress: Progress, metrics: ModelMetrics | None) -> Runner:
        """Load a text model and warm it up."""
        if spec.shard is None:
            chosen = self.policies.find(spec)
            loaded = loader.load(spec, progress=progress, policy=chosen.policy)
            return self._build_here(spec, chosen, loaded, progress, metrics)
        if spec.policy:
            raise LoadFailed(spec.key, "its policy is the device's where ranks share it; 'policy' can't be set")
        if self._leader is None:
            raise sharding.alone(spec)
        with self._leader.loading(spec) as number:
            loaded = loader.load(spec, progress=progress, divide=sharding.nothing, policy=self._policy)
            opened = self._leader.open(number, spec.key, self._stall_target, progress)
            batch = LeadingBatch(self._leader, number, opened, self._peers, metrics)
            runner = self._finish(spec, replace(loaded, weight_bytes=opened.weight_bytes), batch, progress)
            runner.idle_steps = self._in_turn(runner.idle_steps, batch.load)
            return runner

    def build_embedding(self, spec: ModelSpec, progress: Progress, metrics: ModelMetrics | None) -> Runner:
        """Load an embedding model and warm it up. It has neither KV cache nor prefixes."""
        _refuse_settings(spec, "an embedding model")
        model = embedding_model.load(spec, progress=progress, policy=self._policy)
        return EmbeddingRunner(spec, model, self._encoder_batch(model, progress, metrics))

    def build_reranker(self, spec: ModelSpec, progress: Progress, metrics: ModelMetrics | None) -> Runner:
        """Load a reranker and warm it up. It has neither KV cache nor prefixes."""
        _refuse_settings(spec, "a reranker")
        model = reranker_model.load(spec, progress=progress, policy=self._policy)
        return RerankRunner(spec, model, self._encoder_batch(model, progress, metrics))

    def _encoder_batch(self, model: Encoder, progress: Progress, metrics: ModelMetrics | None) -> EncoderBatch:
        """The batch of an encoder, warmed up."""
        batch = EncoderBatch(
            model, stall_target=self._stall_target, peers=self._peers, policy=self._policy, metrics=metrics
        )
        progress("warming up", 0, 0)
        batch.warm_up()
        self._peers.add(batch.load)
        return batch

    def _build_here(
        self,
        spec: ModelSpec,
        chosen: ModelPolicy,
        loaded: loader.LoadedModel,
        progress: Progress,
        metrics: ModelMetrics | None,
        vision: Vision | None = None,
    ) -> Runner:
        """The runner of a loaded model that this process computes, warmed up."""
        policy = self._fitting_policy(spec, chosen, loaded)  # first: what can't be run has no cache to be measured
        loaded = without_idle_head(spec, loaded, policy)
        kind = spec.drafter and (spec.drafter.kind or _find_kind(spec.drafter, progress))
        draft = load_draft(spec, loaded, policy, self._policy, kind or "text", progress, self._kept_checks)
        if draft:
            loaded = replace(loaded, weight_bytes=loaded.weight_bytes + draft.weight_bytes)
        with (
            holdings.prefixes(self.prefix_cache, spec, loaded) as prefixes,
            holdings.draft_prefixes(self.prefix_cache, spec, draft) as draft,
            holdings.account(self.pool, spec, loaded, draft) as account,
        ):
            scheduler = self._scheduler(spec, loaded, policy, prefixes, account, metrics, draft)
            runner = self._finish(spec, loaded, scheduler, progress, vision)
            runner.facts = replace(runner.facts, policy=chosen.facts(policy.with_weights(spec.weights)))
            measuring = self._measuring(spec, chosen, loaded, policy, account, scheduler.load)
            runner.idle_steps = self._in_turn(chain(runner.idle_steps, measuring), scheduler.load)
            if prefixes:
                prefixes.is_warm = True
            return runner

    def build_vision(self, spec: ModelSpec, progress: Progress, metrics: ModelMetrics | None) -> Runner:
        """Load a vision model and warm it up. One that was found to be of this kind, and whose vision part can't be
        used, is a text model.
        """
        if spec.shard and spec.kind:
            raise LoadFailed(spec.key, "it is a vision model, which ranks can't share")
        if spec.shard:
            return self.build_text(spec, progress, metrics)
        chosen = self.policies.find(spec)
        loaded = loader.load(spec, progress=progress, policy=chosen.policy)
        try:
            vision = load_vision(spec, loaded, progress, chosen.policy.with_weights(spec.weights))
        except LoadFailed as failure:
            if spec.kind:
                raise
            log.warning("%s: loaded as a text model: %s", spec.key, failure.cause)
            vision = None
        return self._build_here(spec, chosen, loaded, progress, metrics, vision)

    def _scheduler(
        self,
        spec: ModelSpec,
        loaded: loader.LoadedModel,
        policy: ExecutionPolicy,
        prefixes: ModelPrefixes | None,
        account: KVAccount,
        metrics: ModelMetrics | None,
        draft: DraftModel | None,
    ) -> Scheduler:
        return Scheduler(
            loaded.model,
            max_running=spec.max_running,
            stall_target=self._stall_target,
            prefixes=prefixes,
            peers=self._peers,
            max_kv_tokens=loaded.limits.cache_tokens,
            account=account,
            metrics=metrics,
            checkpoint_interval=spec.checkpoint_interval,
            policy=policy,
            speculation=spec.speculation,
            draft=draft,
        )

    def _fitting_policy(self, spec: ModelSpec, chosen: ModelPolicy, loaded: loader.LoadedModel) -> ExecutionPolicy:
        """The policy with the paths that this model can take. Raises LoadFailed if it can't even run alone."""
        failure: LoadFailed
        try:
            with naming_what_is_missing():
                return fitting_policy(loaded.model, chosen.policy, spec.key, self._kept_checks)
        except Exception as error:  # foreign code: it can raise anything
            failure = LoadFailed(spec.key, f"the model can't be run: {one_line(error)}")
        raise failure  # out here, without the frames that hold the weights

    def _measuring(
        self,
        spec: ModelSpec,
        chosen: ModelPolicy,
        loaded: loader.LoadedModel,
        policy: ExecutionPolicy,
        account: KVAccount,
        load: EngineLoad,
    ) -> Iterator[object]:
        """Steps that measure what is left: candidates, and the weights' format. policy: as the self-check left it."""
        names = [name for name in chosen.candidates if getattr(policy, name) == getattr(chosen.policy, name)]
        if (before := chosen.choice) and names:
            yield from Measurement(
                spec.key,
                loaded.model,
                policy,
                names,
                spec.max_running,
                borrowing=account.borrowing,
                is_right=lambda own: fitting_policy(loaded.model, own, spec.key, self._kept_checks) == own,
                is_quiet=lambda: self._peers.are_idle(load),
                keep=lambda result: self.policies.keep(spec, before, result),
                clock=self._clock,
            ).steps()
        if (weights := chosen.weights) and chosen.measures_weights and loaded.products:
            yield from WeightMeasurement(
                spec.key,
                loaded.products,
                borrowing=account.borrowing,
                is_quiet=lambda: self._peers.are_idle(load),
                keep=lambda result: self.policies.keep_weights(spec, weights, result),
                clock=self._clock,
            ).steps()

    def _in_turn(self, steps: Iterator[object], load: EngineLoad) -> Iterator[object]:
        """Idle steps of a model, while no other one computes."""
        return self._turns.taken(steps, lambda: self._peers.are_idle(load))

    def _finish(
        self,
        spec: ModelSpec,
        loaded: loader.LoadedModel,
        batch: Scheduler | LeadingBatch,
        progress: Progress,
        vision: Vision | None = None,
    ) -> TextRunner:
        progress("warming up", 0, 0)
        warm_up(batch)
        self._peers.add(batch.load)
        return VisionRunner(spec, loaded, batch, vision) if vision else TextRunner(spec, loaded, batch)


RUNNERS: Mapping[Kind, Callable[[Builder, ModelSpec, Progress, ModelMetrics | None], Runner]] = {
    "text": Builder.build_text,
    "vision": Builder.build_vision,
    "embedding": Builder.build_embedding,
    "rerank": Builder.build_reranker,
}


def _find_kind(spec: ModelSpec, progress: Progress) -> Kind:
    """The kind of a model, whose files are fetched if none of them is here that tells it. Raises LoadFailed."""
    kind = sources.known_kind(spec.source)
    if kind is None and not spec.shard and sources.is_repository(spec.source):  # ranks fetch what they share at once
        complete_or_nothing(spec, lambda: sources.resolve(spec.source, progress=progress))
        kind = sources.known_kind(spec.source)
    return kind or "text"


def _refuse_settings(spec: ModelSpec, kind: str) -> None:
    """Raise LoadFailed if the model has a setting that its kind can't have."""
    names = ("shard", "adapter", "kv_bits", "policy", "draft")
    if setting := next((name for name in names if getattr(spec, name)), None):
        raise LoadFailed(spec.key, f"it is {kind}, which can't have {setting!r}")


def warm_up(batch: Scheduler | LeadingBatch) -> None:
    """Answer two short requests, so that the first one of a client does not pay for all that is new.

    Other shapes are for idle moments (scheduler/warm_up.py).
    """
    tokens = tuple(n % batch.vocab_size for n in range(1, _WARM_UP_TOKENS))
    for sampling in (GREEDY, SAMPLED):
        batch.insert([Sequence(-1, tokens, sampling, 3)])
        for _ in range(_WARM_UP_STEPS):
            batch.prefill()
            batch.decode()
        batch.remove([-1])
    batch.shrink_prefixes(0)
