"""Rehearsal of decode steps: those of sequences that no request has, to compile their shapes or to time them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.classes import capacity_for
from mlxserver.engine.kv_cache.slots import empty_layers, fill, grow
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.sampler import GREEDY, SAMPLED
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.step_costs import PLAIN, Plan
from mlxserver.engine.sequence import PromptImages, Sequence

STEPS = 2  # until a shape is compiled: in the second one, the inputs are sampled tokens


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Steps of sequences of these lengths in tokens. is_shifted: their positions differ from their offsets.

    plan: of a verifying step.
    """

    lengths: tuple[int, ...]
    is_greedy: bool = False
    is_shifted: bool = False
    plan: Plan = PLAIN

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that their slots hold."""
        slots = 1 << (len(self.lengths) - 1).bit_length()
        return slots * max(capacity_for(length + STEPS) for length in self.lengths)


class Rehearsal:
    """Rehearsal of a model in one decode batch, which is empty before and after."""

    def __init__(self, model: Any, running: DecodeBatch, policy: ExecutionPolicy) -> None:
        self.has_slots = policy.batch_cache == "slots" and caches.is_plain(model)
        self._model = model
        self._running = running

    @contextmanager
    def joined(self, shape: DecodeShape, steps: int = STEPS) -> Iterator[None]:
        """Sequences join as those of requests do, the first one alone. steps: most calls of advance() in the block."""
        assert not self._running.sequences
        blank = {length: self._blank(length) for length in set(shape.lengths)}
        first, *others = [self._prompt(n, blank[length], shape, steps) for n, length in enumerate(shape.lengths)]
        is_alike = len(set(shape.lengths)) == 1
        try:
            self._running.join([first], coming=len(others) if is_alike else 0)
            if others:
                self._running.join(others)
            yield
        finally:
            self._running.clear()

    def verify(self, plan: Plan) -> None:
        """Compute a verifying step."""
        self._running.rehearse(plan)
        mx.eval(self._running.sampled)

    def advance(self, steps: int = STEPS) -> None:
        """Compute so many steps."""
        for _ in range(steps):
            self._running.pause()  # its duration is no sample of a request's step
            self._running.advance()
        mx.eval(self._running.sampled)

    def _prompt(self, number: int, cache: caches.Cache, shape: DecodeShape, steps: int) -> PendingPrompt:
        """A prompt that is processed, all but its last token. cache: its own, or one that others share."""
        images = cast(PromptImages, SimpleNamespace(shift=1)) if shape.is_shifted else None  # all that a step needs
        sampling = GREEDY if shape.is_greedy else SAMPLED
        sequence = Sequence(-1 - number, (0,), sampling, steps + 1, images=images)
        return PendingPrompt([sequence], 0.0, cache=cache)

    def _blank(self, length: int) -> caches.Cache:
        """A cache of so many tokens; their values have no meaning."""
        cache = caches.new_cache(self._model)
        if self.has_slots:
            keys, values = empty_layers(self._model)
            capacity = capacity_for(length)
            fill(cache, [grow(own, 1, capacity) for own in keys], [grow(own, 1, capacity) for own in values], length)
        else:
            self._model(mx.zeros((1, length), dtype=mx.uint32), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache
