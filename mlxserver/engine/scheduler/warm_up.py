"""Warm-up of a batch: the shapes that requests will use are computed before they come.

A GPU pays for a shape when it is new: kernels are compiled, graphs are traced, attention is planned. Those of short
requests come first, then those at growing lengths, and last those of verifying steps, which requests can do without.

Rule 1: a step of the iterator computes one shape. Before and after it the batch is empty; in between it may serve.
Rule 2: a shape's memory is borrowed for the step. One that does not fit beside all else is left out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from mlxserver.engine.kv_cache.classes import capacity_for
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.kv_budget import KVBudget
from mlxserver.engine.scheduler.prefill import Prefill
from mlxserver.engine.scheduler.rehearsal import STEPS, DecodeShape, Rehearsal
from mlxserver.engine.scheduler.step_costs import PLAIN

LONGEST = 32_768  # tokens up to which shapes are warmed up
_SHORT = 33  # tokens of a prompt whose slot is the smallest
_FEW = (1, 2, 4, 8)  # short sequences whose decode steps are warmed up beside one of up to so many tokens
_LONG = 8192
_STEP = 256  # tokens by which the capacities of chunks differ at least
_COPIES = 2  # of a shape's KV cache that may exist at once
_MOST_VERIFIED = 4  # sequences whose verifying steps are warmed up: more of them have a GPU compute enough as it is


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """A chunk of so many prompts, of so many tokens each, in slots of this capacity."""

    prompts: int
    tokens: int
    capacity: int

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that the slots hold."""
        return self.prompts * self.capacity


Shape = DecodeShape | ChunkShape


class WarmUp:
    """Warm-up of one batch, in the compiled functions that its requests will use."""

    def __init__(
        self,
        model: Any,
        running: DecodeBatch,
        prefill: Prefill,
        budget: KVBudget,
        policy: ExecutionPolicy,
        max_running: int,
    ) -> None:
        self._model = model
        self._running = running
        self._rehearsal = Rehearsal(model, running, policy)
        self._prefill = prefill
        self._budget = budget
        self._policy = policy
        self._max_running = max_running

    def steps(self, longest: int, most_tokens: int | None = None) -> Generator[Shape, None, None]:
        """Compute the shapes one by one, and yield each that was computed.

        longest: tokens of the longest sequence. most_tokens: of KV cache in a shape; None for as many as the pool has.
        """
        known: set[Shape] = set()
        for shape in self._shapes(min(longest, LONGEST)):
            kv_tokens = _COPIES * self._kv_tokens(shape)
            if shape in known or (most_tokens is not None and kv_tokens > most_tokens):
                continue
            known.add(shape)
            with self._budget.borrowing(kv_tokens) as is_granted:
                if is_granted:
                    self._compute(shape)
            if is_granted:
                yield shape
        device.clear_cache()  # of the shapes' arrays

    def _kv_tokens(self, shape: Shape) -> int:
        """Tokens of KV cache that a shape takes."""
        if isinstance(shape, DecodeShape):
            return self._running.cache.tokens_for([length + STEPS for length in shape.lengths])
        return shape.kv_tokens

    def _shapes(self, longest: int) -> Iterator[Shape]:
        """The shapes, in the order in which they are likely to be used."""
        if not self._policy.warm_up_all_batch_sizes:
            return
        yield from self._smallest()
        if not (self._policy.compile_steps and self._rehearsal.has_slots):
            return  # the lengths of sequences make no difference
        for shorter, length in pairwise([0, *lengths_up_to(longest)]):
            for own in range(shorter + _STEP, length + 1, _STEP):  # chunks have slots of more capacities
                yield from self._chunks(own)
            yield from self._decodes(length)
        yield from self._verifyings(longest)

    def _smallest(self) -> Iterator[Shape]:
        """Shapes of short requests, of any number up to max_running."""
        yield from self._chunks(_SHORT)
        sizes = self._sizes()
        for is_greedy in (False, True):
            yield from (DecodeShape((_SHORT,) * size, is_greedy) for size in sizes)
        if hasattr(self._model, "sight"):
            yield from (DecodeShape((_SHORT,) * size, is_shifted=True) for size in sizes)

    def _chunks(self, length: int) -> Iterator[ChunkShape]:
        """Chunks of prompts of so many tokens."""
        return (ChunkShape(*sizes) for sizes in self._prefill.shapes(length))

    def _decodes(self, length: int) -> Iterator[DecodeShape]:
        """Decode steps of sequences that have a slot for so many tokens: beside much shorter ones, and alike."""
        shapes = [DecodeShape(lengths) for lengths in self._beside_shorter(length)]
        yield from (shape for shape in shapes if len(shape.lengths) <= self._max_running)
        yield from (DecodeShape((length - STEPS,) * size) for size in self._sizes())

    def _beside_shorter(self, length: int) -> Iterator[tuple[int, ...]]:
        """Lengths of a sequence that fills its class, and others: few short ones, or one of every shorter class.

        There are more combinations than can be computed. These are the likely ones, and each number of classes.
        """
        assert isinstance(self._running.cache, SlotCache)
        class_of = self._running.cache.class_of
        first, *others = [own for own in lengths_up_to(length) if class_of(own) == own] or [length]
        if class_of(length) != length or not others:
            return
        for short, size in product((_SHORT, first - STEPS), _FEW if length <= _LONG else ()):
            yield (short,) * size + (length - STEPS,)
        yield tuple(own - STEPS for own in (first, *others))

    def _verifyings(self, longest: int) -> Iterator[DecodeShape]:
        """Verifying steps of few sequences that are alike: the more there are, the shorter they are."""
        plans = self._running.plans_to_rehearse()
        for size in self._sizes() if plans else ():
            lengths = lengths_up_to(min(longest, LONGEST // size)) if size <= _MOST_VERIFIED else []
            for length, plan in product(lengths, plans):
                shape = DecodeShape((length - plan.tokens,) * size, plan=plan)
                yield from (shape, replace(shape, is_greedy=True)) if length == lengths[0] else (shape,)

    def _sizes(self) -> list[int]:
        """Numbers of sequences, each with another number of slots."""
        return [min(1 << power, self._max_running) for power in range((self._max_running - 1).bit_length() + 1)]

    def _compute(self, shape: Shape) -> None:
        match shape:
            case ChunkShape():
                self._prefill.rehearse(shape.prompts, shape.tokens, shape.capacity)
            case DecodeShape():
                with self._rehearsal.joined(shape):
                    if shape.plan == PLAIN:
                        self._rehearsal.advance()
                    else:
                        self._rehearsal.verify(shape.plan)


def lengths_up_to(longest: int) -> list[int]:
    """Lengths that fill a slot, ascending; each has another capacity."""
    lengths = []
    length = capacity_for(1)
    while length <= longest:
        lengths.append(length)
        length = capacity_for(length + 1)
    return lengths
