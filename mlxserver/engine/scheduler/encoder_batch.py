"""Batches of an encoder, which is an embedding model or a reranker: texts of many requests in one forward pass a step.

Rule 1: the next batch has the text that is due first, and those of its length class that are due next; those of other
        classes, too, if that takes less time, as measured, than a batch of their own: on a GPU, where few texts take
        about as long as many, and not where the time is that of the tokens, padding included. A text is due
        when all tokens of its request before it, and those of other requests in the same time, have been processed
        (start-time fair queueing, Goyal et al. 1996): one query does not wait for a thousand documents.
Rule 2: while a peer streams, a batch takes about the stall target; where the peer's steps can't go on beside it, about
        one of these.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections import abc
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlxserver.engine.loading.estimate import most_batch_tokens
from mlxserver.engine.metrics import EngineLoad, ModelMetrics
from mlxserver.engine.platform.attention_memory import SMALLEST_CHUNK, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.load_meter import LoadMeter
from mlxserver.engine.scheduler.peers import Peers
from mlxserver.engine.scheduler.prefill import IDLE_STALL_FACTOR, LEAST_BASES, ChunkTimes
from mlxserver.engine.sequence import SampledToken, Sequence

_STEPS_PER_DOUBLING = 4  # length classes: padding is a fifth of a text at most


class Encoder(Protocol):
    """The model, as its batches use it."""

    context_length: int
    heads: int

    def encode(
        self,
        texts: abc.Sequence[abc.Sequence[int]],
        count: int,
        length: int,
        beside_peers: bool = False,
        second_texts: abc.Sequence[int] = (),
    ) -> list[np.ndarray[Any, Any]]:
        """The vectors of texts of tokens, in a batch of the shape [count, length].

        second_texts: Sequence.second_text of each.
        """


class _Due(NamedTuple):
    """A text that waits. at: tokens of its own request and of others before it."""

    at: int
    id: int


class EncoderBatch:
    """The Batch of an encoder: a sequence has its vector, or a reranker's score, after one step, and ends with it."""

    def __init__(
        self,
        model: Encoder,
        *,
        stall_target: float,
        peers: Peers,
        policy: ExecutionPolicy,
        metrics: ModelMetrics | None = None,
        times: ChunkTimes | None = None,
    ) -> None:
        self._model: Encoder | None = model
        self._stall_target = stall_target
        self._peers = peers
        self._policy = policy
        self._metrics = metrics
        self._attention = AttentionMemory(model.heads, policy)
        self._most_tokens = most_batch_tokens(model.context_length, policy)
        self._lengths = length_classes(model.context_length)
        self._meter = LoadMeter(0.0)
        self._times = times or ChunkTimes()
        self._sequences: dict[int, Sequence] = {}
        self._due: dict[int, list[_Due]] = {}  # heap by length class; may have sequences that are removed
        self._processed = 0  # tokens of a request that has been served all the time
        self._at_work: list[int] = []

    @property
    def load(self) -> EngineLoad:
        """What other threads may read of the batch."""
        return self._meter.load

    def insert(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue the texts of one request."""
        self._meter.insert(sequences)
        at = self._processed
        for sequence in sequences:
            at += len(sequence.tokens)
            self._sequences[sequence.id] = sequence
            self._queue(sequence, at)

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences. Unknown ids are ignored."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
        self._meter.remove(sequence_ids)
        if not self._sequences:
            self._due.clear()
        self._meter.update([], [], is_busy=bool(self._sequences))

    def decode(self) -> list[SampledToken]:
        """Process the next batch. Its sequences are done."""
        if not self._sequences:
            return []
        assert self._model is not None
        peer_step = self._peers.observe(self._meter.load)
        texts, count, length = self._next_batch(peer_step)
        self._begin(texts)
        started = time.monotonic()
        vectors = self._model.encode(
            [text.tokens for text in texts], count, length, peer_step > 0, [text.second_text for text in texts]
        )
        self._times.note(count * length, time.monotonic() - started)
        self._at_work = []
        for text in texts:
            del self._sequences[text.id]
        return [
            SampledToken(text.id, 0, started=started, vector=vector.astype("<f4", copy=False).tobytes())
            for text, vector in zip(texts, vectors, strict=True)
        ]

    def prefill(self) -> None:
        """Nothing: a text is processed in one step."""

    def is_empty(self) -> bool:
        """Whether no sequence waits."""
        return not self._sequences

    def waiting(self) -> set[int]:
        """Ids of the sequences that were not in the step that failed."""
        return self._sequences.keys() - set(self._at_work)

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """Queue the sequences that stay again, for smaller batches; there is no cache to drop."""
        self._most_tokens = max(self._lengths[-1], self._most_tokens // 2)
        failed, self._at_work = self._at_work, []
        self.remove([id for id in self._sequences if id not in staying])
        for id in failed:
            if id in self._sequences:
                self._queue(self._sequences[id], self._processed)
        return []

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._sequences.clear()

    def warm_up(self) -> None:
        """Run the shapes that texts use, where shapes have to recur; or else one."""
        assert self._model is not None
        for length in self._lengths if self._policy.pad_slots else self._lengths[:1]:
            counts = {1, 1 << (self._most_texts(length, self._most_tokens).bit_length() - 1)}
            for count in counts if self._policy.pad_slots else {1}:
                self._model.encode([], count, length)

    def _queue(self, sequence: Sequence, at: int) -> None:
        length = self._lengths[bisect_left(self._lengths, len(sequence.tokens))]
        heapq.heappush(self._due.setdefault(length, []), _Due(at, sequence.id))

    def _next_batch(self, peer_step: float) -> tuple[list[Sequence], int, int]:
        """The texts of the next batch, and its shape."""
        for length in list(self._due):
            self._drop_removed(length)
        first = min(self._due, key=lambda each: self._due[each][0])
        budget = self._budget(peer_step)
        lengths = self._together(first, budget)
        longest = max(lengths)
        most = self._most_texts(longest, budget)
        texts: list[Sequence] = []
        for due in [self._due[length] for length in lengths]:
            while due and len(texts) < most:
                at, id = heapq.heappop(due)
                if id in self._sequences:
                    self._processed = max(self._processed, at)
                    texts.append(self._sequences[id])
        if self._policy.pad_slots:
            return texts, min(most, self._rows(len(texts))), longest
        return texts, len(texts), max(len(text.tokens) for text in texts)

    def _together(self, first: int, budget: int) -> list[int]:
        """The length classes of the next batch: the first one, and those whose texts it takes less time with."""
        chosen = [first]
        for other in sorted(self._due.keys() - {first}, key=lambda each: abs(each - first)):
            joined = [*chosen, other]
            if sum(len(self._due[each]) for each in joined) > self._most_texts(max(joined), budget):
                break
            padding = self._tokens(joined) - self._tokens(chosen) - self._tokens([other])
            if padding * self._times.each >= self._times.base:
                break
            chosen = joined
        return chosen

    def _tokens(self, lengths: abc.Sequence[int]) -> int:
        """Tokens of a batch with all texts of these classes, padding included."""
        return self._rows(sum(len(self._due[length]) for length in lengths)) * max(lengths)

    def _rows(self, texts: int) -> int:
        """Rows of a batch of so many texts: a power of two where shapes have to recur."""
        return 1 << (texts - 1).bit_length() if self._policy.pad_slots else texts

    def _drop_removed(self, length: int) -> None:
        due = self._due[length]
        while due and due[0].id not in self._sequences:
            heapq.heappop(due)
        if not due:
            del self._due[length]

    def _most_texts(self, length: int, budget: int) -> int:
        """Texts of a length class in a batch of so many tokens; a power of two where shapes have to recur."""
        most = max(1, min(budget // length, self._attention.fit_texts(length)))
        return 1 << (most.bit_length() - 1) if self._policy.pad_slots else most

    def _budget(self, peer_step: float) -> int:
        """Tokens of the next batch."""
        seconds = self._stall_target if peer_step else IDLE_STALL_FACTOR * self._stall_target
        if peer_step and not self._policy.parallel_models:
            seconds = min(seconds, max(peer_step, LEAST_BASES * self._times.base))
        return min(max(int(self._times.tokens_in(seconds)), SMALLEST_CHUNK), self._most_tokens)

    def _begin(self, texts: abc.Sequence[Sequence]) -> None:
        """Note that these texts are at work."""
        self._at_work = [text.id for text in texts]
        self._meter.update([], self._at_work, is_busy=True)
        for text in texts:
            if text.progress:
                text.progress.state = None
        if self._metrics:
            self._metrics.batch_size.observe(len(texts))


def length_classes(longest: int) -> tuple[int, ...]:
    """Lengths in tokens that texts are padded to at most, ascending: 16, then four per doubling, up to the longest."""
    return tuple(_up_to(longest))


def _up_to(longest: int) -> Iterable[int]:
    length = SMALLEST_CHUNK
    while length < longest:
        yield length
        length += max(SMALLEST_CHUNK, (1 << (length.bit_length() - 1)) // _STEPS_PER_DOUBLING)
    yield longest
