"""Measurement of policies: what a device does in its own way is timed on the model at hand, in idle moments.

Each candidate has one field of the policy otherwise. It is timed beside the current policy, in turns, for one sequence,
for several, and for a chunk of a prompt. The best of those that are faster by a margin, and in every round, is adopted
if it passes the model's self-check, and the others are timed again beside it. The next load of this shape has the
choice.

Rule 1: a step is one sample, or one self-check. Nothing is held between steps: compiled functions, a batch, or another
        form of the weights.
Rule 2: a sample's memory is borrowed for the step. A candidate that does not fit, or is faster now and then, is left
        for another load.
Rule 3: a candidate counts as failed while its first sample runs, so that one that ends the process is not tried again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.config.settings import POLICY_FIELDS
from mlxserver.engine.errors import one_line
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading import fused_layers, fused_projections
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.sampler import GREEDY
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.execution import make_prefill_strategy
from mlxserver.engine.scheduler.kv_budget import block_bytes
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.rehearsal import STEPS, DecodeShape, Rehearsal
from mlxserver.engine.sequence import Sequence as TokenSequence
from mlxserver.engine.worker.runner import PAUSE

log = logging.getLogger("engine")

LEAST_SPEEDUP = 1.05  # of a candidate that is adopted: less is noise, or not worth the change
ROUNDS = 5  # samples of each policy
_SEVERAL = 8  # sequences that decode together
_LENGTH = 200  # tokens of each, where a KV cache can be made up; else of a prompt that has to be computed
_SHORT = 32
_PROMPT = 64  # tokens of a chunk
_SECONDS, _MOST_STEPS = 0.1, 16  # of a sample of decode steps
_COPIES = 2  # of its KV cache that may exist at once

Borrowing = Callable[[int], AbstractContextManager[bool]]  # of so many bytes; whether they are there


@dataclass(frozen=True, slots=True)
class Result:
    """Fields that were chosen, and the speedup of every candidate that was timed; 0 of one that failed."""

    fields: Mapping[str, bool]
    speedups: Mapping[str, float]


class Measurement:
    """Measurement of one loaded model, whose batch is empty in every step.

    policy: the current one. candidates: names of its fields. borrowing: memory of the pool, for a step. is_right: the
    model's self-check. is_quiet: whether no other model computes; a sample beside one is taken again. keep: called with
    what is known so far, whenever that changes.
    """

    def __init__(
        self,
        key: str,
        model: Any,
        policy: ExecutionPolicy,
        candidates: Sequence[str],
        max_running: int,
        *,
        borrowing: Borrowing,
        is_right: Callable[[ExecutionPolicy], bool],
        is_quiet: Callable[[], bool],
        keep: Callable[[Result], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._key = key
        self._model = model
        self._policy = policy
        self._is_fused = policy.fuse_projections
        self._best = policy
        self._names = [name for name in candidates if self._makes_a_difference(name)]
        self._borrowing = borrowing
        self._is_right = is_right
        self._is_quiet = is_quiet
        self._keep = keep
        self._samples = Samples(model, clock)
        self._sizes = sorted({1, min(_SEVERAL, max_running)})
        self._fields: dict[str, bool] = {}
        self._speedups: dict[str, float] = {}
        self._begun: set[str] = set()

    def steps(self) -> Iterator[object]:
        """Take the samples, one per step, and keep the result. Each step gives the policy's name, or PAUSE."""
        names = self._names
        while names:
            candidates = {name: self._otherwise(name) for name in names}
            speedups = yield from self._measure(candidates)
            self._speedups |= speedups
            names = []
            for name in sorted(speedups, key=lambda name: speedups[name], reverse=True):
                if speedups[name] < LEAST_SPEEDUP:
                    break
                is_adopted = self._adopt(name, candidates[name])
                yield "self-check"
                if is_adopted:
                    names = [other for other in speedups if other != name and self._speedups.get(other)]
                    break
            self._keep(Result(dict(self._fields), dict(self._speedups)))
        if self._names:
            log.info("%s: measured %s; chosen: %s", self._key, self._speedups, self._fields or "nothing else")
            device.clear_cache()

    def _makes_a_difference(self, name: str) -> bool:
        """Whether the model is computed otherwise with the other value of a field."""
        if name == "fuse_projections":
            return fused_projections.switchable_bytes(self._model, self._is_fused) > 0
        if name == "fuse_layers" and not fused_layers.has_fused_layers(self._model):
            return False
        return self._best.batch_cache == "slots" and caches.is_plain(self._model)

    def _otherwise(self, name: str) -> ExecutionPolicy:
        return self._best.with_fields({name: not getattr(self._best, name)})

    def _adopt(self, name: str, candidate: ExecutionPolicy) -> bool:
        """Take a candidate for the best, if the model's self-check has nothing against it."""
        with self._borrowing(self._form_bytes(candidate)) as is_granted:
            if not is_granted:
                del self._speedups[name]
                return False
            try:
                with self._form(candidate):
                    is_right = self._is_right(candidate)
            except Exception as error:  # of any kind: it is foreign code
                self._warn(name, error)
                is_right = False
        if is_right:
            self._best = candidate
            values = {own: getattr(candidate, own) for own in POLICY_FIELDS}
            self._fields = {own: value for own, value in values.items() if value != getattr(self._policy, own)}
        else:
            self._speedups[name] = 0.0
        return is_right

    def _warn(self, name: str, error: Exception) -> None:
        log.warning("%s: %s is dropped: %s: %s", self._key, name, type(error).__name__, one_line(error))
        device.clear_cache()

    # -- samples --------------------------------------------------------------------------------------------------

    def _measure(self, candidates: Mapping[str, ExecutionPolicy]) -> Generator[object, None, dict[str, float]]:
        """Speedups of the candidates that could be timed; 0 of those that failed."""
        times: dict[str, list[list[float]]] = {name: [[] for _ in self._work] for name in ("", *candidates)}
        failed: dict[str, float] = {}
        for _ in range(ROUNDS):
            for number in range(len(self._work)):
                for name in list(times):
                    policy = candidates.get(name, self._best)
                    try:
                        seconds = yield from self._timed(name, policy, number)
                    except Exception as error:  # of any kind: it is foreign code, and may have no memory
                        if not name:
                            raise
                        self._warn(name, error)
                        failed[name], seconds = 0.0, None
                    if seconds is None:
                        del times[name]
                    else:
                        times[name][number].append(seconds)
                if "" not in times:
                    return {}  # there is no memory for the present policy
        present = times.pop("")
        speedups = {name: speedup(present, own) for name, own in times.items()}
        faster = [name for name, ratio in speedups.items() if ratio >= LEAST_SPEEDUP]
        for name in [name for name in faster if not is_steady(present, times[name])]:
            log.info("%s: %s varies too much: %.2f times as fast", self._key, name, speedups.pop(name))
        return speedups | failed

    def _timed(self, name: str, policy: ExecutionPolicy, number: int) -> Generator[object, None, float | None]:
        """Seconds of a sample, taken while nothing else computes; None where its memory is not there."""
        while True:
            is_first = name not in self._begun and name != ""
            if is_first:
                self._begun.add(name)
                self._keep(Result(dict(self._fields), {**self._speedups, name: 0.0}))
            seconds = self._sample(policy, self._work[number])
            if is_first:
                self._keep(Result(dict(self._fields), dict(self._speedups)))
            if seconds is None:
                return None
            is_quiet = self._is_quiet()
            yield (name or "present policy") if is_quiet else PAUSE
            if is_quiet:
                return seconds

    @property
    def _work(self) -> list[int]:
        """Kinds of samples: so many sequences that decode, or none: a chunk of a prompt."""
        return [*self._sizes, 0]

    def _sample(self, policy: ExecutionPolicy, size: int) -> float | None:
        with self._borrowing(self._samples.kv_bytes(policy, size) + self._form_bytes(policy)) as is_granted:
            if not is_granted:
                return None
            with self._form(policy):
                return self._samples.decode(policy, size) if size else self._samples.prefill(policy)

    def _form_bytes(self, policy: ExecutionPolicy) -> int:
        """Memory of the model's other form, beside the present one: projections that are parted share that."""
        is_other = policy.fuse_projections and not self._is_fused
        return fused_projections.switchable_bytes(self._model, is_fused=False) if is_other else 0

    @contextmanager
    def _form(self, policy: ExecutionPolicy) -> Iterator[None]:
        """The model as it is loaded under a policy."""
        if policy.fuse_projections == self._is_fused:
            yield
            return
        switch = fused_projections.part_projections if self._is_fused else fused_projections.fuse_projections
        former = switch(self._model)
        try:
            mx.eval(self._model.parameters())
            yield
        finally:
            fused_projections.swap(former)
            device.clear_cache()  # of the other form


class Samples:
    """Samples of a model's work, each in a batch of its own."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._sizes = caches.cache_sizes(model)
        self._vocab_size: int = model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1]  # lazy: nothing is computed

    def kv_bytes(self, policy: ExecutionPolicy, size: int) -> int:
        """Memory that a sample takes."""
        tokens = self._shape(policy, max(1, size)).kv_tokens
        return block_bytes(self._sizes, _COPIES * tokens, max(1, size))

    def decode(self, policy: ExecutionPolicy, size: int) -> float:
        """Seconds per step of so many sequences."""
        batch = DecodeBatch(self._model, self._vocab_size, policy=policy)
        rehearsal = Rehearsal(self._model, batch, policy)
        with rehearsal.joined(self._shape(policy, size), STEPS + 1 + _MOST_STEPS):
            rehearsal.advance(STEPS if policy.compile_steps else 1)
            started = self._clock()
            rehearsal.advance(1)
            alone = self._clock() - started
            steps = min(_MOST_STEPS, int(_SECONDS / max(alone, 1e-6)))
            if not steps:
                return alone  # a request must not wait for more
            started = self._clock()
            rehearsal.advance(steps)
            return (self._clock() - started) / steps

    def prefill(self, policy: ExecutionPolicy) -> float:
        """Seconds of a chunk; where chunks are compiled, of the second one."""
        strategy, seconds = make_prefill_strategy(self._model, replace(policy, async_chunks=False)), 0.0
        for number in range(2 if policy.compile_steps else 1):
            sequence = TokenSequence(-1, (number,) * (_PROMPT + 1), GREEDY, 1)
            prompt = PendingPrompt([sequence], 0.0, cache=caches.new_cache(self._model))
            started = self._clock()
            strategy.run(strategy.choose([prompt], _PROMPT))
            seconds = self._clock() - started
        return seconds

    def _shape(self, policy: ExecutionPolicy, size: int) -> DecodeShape:
        is_plain = policy.batch_cache == "slots" and caches.is_plain(self._model)
        return DecodeShape((_LENGTH if is_plain else _SHORT,) * size)


def speedup(present: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    """Geometric mean of how many times as fast a candidate does each kind of work, by the medians of its samples."""
    ratios = [median(own) / max(median(other), 1e-9) for own, other in zip(present, candidate, strict=True)]
    return math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios))


def is_steady(present: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> bool:
    """Whether a candidate is faster in every round: on a machine with other work, medians alone say little."""
    rounds = zip(zip(*present, strict=True), zip(*candidate, strict=True), strict=True)
    return all(speedup([[own] for own in one], [[own] for own in other]) > 1 for one, other in rounds)
