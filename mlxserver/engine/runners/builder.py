"""A loaded model put together for one engine thread: batch, prompt formatter, output streams; warm-up; release."""

from __future__ import annotations

import threading
import weakref
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.distributed.batch import LeadingBatch
from mlxserver.engine.distributed.leader import Leader
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.loading import loader, sharding
from mlxserver.engine.loading.sources import Progress, silent
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import openblas
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.prompt.formats import FORMATS, find_type
from mlxserver.engine.requests import GenerationRequest, ModelFacts, Question, Sampling
from mlxserver.engine.runners.text import RequestPreparation
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence
from mlxserver.engine.worker.tracker import Output

_CAPABILITIES = frozenset({"chat", "completion", "tools", "json_schema", "logprobs"})  # of every model
_WARM_UP_TOKENS, _WARM_UP_STEPS = 34, 4


@dataclass
class ModelRuntime:
    """A loaded model, as its engine thread uses it."""

    batch: Scheduler | LeadingBatch
    facts: ModelFacts
    preparation: RequestPreparation

    @property
    def preprocess(self) -> Callable[[GenerationRequest], GenerationRequest]:
        """Does what of a request takes long, on any thread. It holds nothing of the model's memory."""
        return self.preparation.preprocess

    def prepare(self, request: GenerationRequest, sequence_ids: Iterator[int]) -> abc.Sequence[tuple[Sequence, Output]]:
        """A row and its output stream for each choice. Raises PromptRejected."""
        return self.preparation.prepare(request, sequence_ids)

    @property
    def answer(self) -> Callable[[Question], Any]:
        """Says what the tokenizer says, on any thread. It holds nothing of the model's memory, either."""
        return self.preparation.answer


class Builder:
    """Builds the runtimes of one process. They know of each other's streams, and keep their chunks short for them.

    leader: leads the ranks that share models, if there are any.
    """

    def __init__(
        self, stall_target: float, leader: Leader | None = None, policy: ExecutionPolicy | None = None
    ) -> None:
        self._policy = policy or current()
        self._stall_target = stall_target
        self._leader = leader
        self._cores = openblas.threads()
        self._batches: list[weakref.ref[Scheduler | LeadingBatch]] = []  # weak: an unloaded model's memory must go
        self._lock = threading.Lock()  # models are built on threads of their own

    def build(self, spec: ModelSpec, progress: Progress = silent, metrics: ModelMetrics | None = None) -> ModelRuntime:
        """Load a model and warm it up, on the thread that will run it. Raises LoadFailed, or what progress raises."""
        if spec.shard is None:
            loaded = loader.load(spec, progress=progress, policy=self._policy)
            return self._put_together(spec, loaded, self._batcher(spec, loaded, metrics), progress)
        if self._leader is None:
            raise sharding.alone(spec)
        with self._leader.loading(spec) as number:
            loaded = loader.load(spec, progress=progress, divide=sharding.nothing, policy=self._policy)
            opened = self._leader.open(number, spec.key, self._stall_target, progress)
            batch = LeadingBatch(self._leader, number, opened, self._peer_step_seconds, metrics)
            return self._put_together(spec, replace(loaded, weight_bytes=opened.weight_bytes), batch, progress)

    def _batcher(self, spec: ModelSpec, loaded: loader.LoadedModel, metrics: ModelMetrics | None) -> Scheduler:
        return Scheduler(
            loaded.model,
            max_running=spec.max_running,
            stall_target=self._stall_target,
            prefix_cache=PrefixCache(spec.prefix_cache_bytes, policy=self._policy) if spec.prefix_cache_bytes else None,
            peer_step_seconds=self._peer_step_seconds,
            share_cores=self._share_cores,
            max_kv_tokens=loaded.limits.cache_tokens,
            metrics=metrics,
            policy=self._policy,
        )

    def _put_together(
        self, spec: ModelSpec, loaded: loader.LoadedModel, batch: Scheduler | LeadingBatch, progress: Progress
    ) -> ModelRuntime:
        model_type = spec.type or find_type(loaded.tokenizer)
        prompts = FORMATS[model_type](loaded.tokenizer, loaded.config)
        progress("warming up", 0, 0)
        warm_up(batch, spec.max_running, self._policy)
        with self._lock:
            self._batches = [*(known for known in self._batches if known()), weakref.ref(batch)]
        grammars = Grammars(loaded.tokenizer, batch.vocab_size)
        capabilities = _CAPABILITIES | ({"thinking"} if model_type == "thinking" else set())
        capabilities -= set() if grammars.is_usable else {"json_schema"}
        facts = ModelFacts(model_type, loaded.context_length, loaded.weight_bytes, capabilities)
        preparation = RequestPreparation(
            loaded.tokenizer,
            prompts,
            facts,
            grammars,
            defaults={**loaded.generation_defaults, **spec.defaults.stated()},
            vocab_size=batch.vocab_size,
            max_rows=spec.max_running,
        )
        return ModelRuntime(batch, facts, preparation)

    def _peer_step_seconds(self, asking: object) -> float:
        """Seconds that a step takes for the quickest other model that streams; 0 while none does."""
        others = (batch for known in self._batches if (batch := known()) and batch is not asking)
        steps = (batch.running_step_seconds() for batch in others)
        return min(filter(None, steps), default=0.0)

    def _share_cores(self) -> None:
        """Give every model that works as many of OpenBLAS's threads: two that take turns with all of them lose time."""
        working = sum(not batch.is_empty() for known in self._batches if (batch := known()))
        openblas.use_threads(max(1, self._cores // max(1, working)))


def warm_up(batch: Scheduler | LeadingBatch, max_rows: int, policy: ExecutionPolicy | None = None) -> None:
    """Run the shapes and samplers that requests use, so that no request pays for a compilation."""
    most = max_rows if (policy or current()).warm_up_all_batch_sizes else 2
    widths = [width for power in range(most.bit_length()) if (width := 1 << power) <= most]
    batch.warm_up()
    tokens = tuple(n % batch.vocab_size for n in range(1, _WARM_UP_TOKENS))
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.9)):
        for width in widths:
            rows = [Sequence(-1 - n, tokens, sampling, 3) for n in range(width)]
            batch.insert(rows)
            for _ in range(_WARM_UP_STEPS):
                batch.prefill()
                batch.decode()
            batch.remove([row.id for row in rows])
    batch.shrink_prefixes(0)
