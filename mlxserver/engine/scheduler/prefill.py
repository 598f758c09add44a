"""Chunked prefill: prompts become KV cache in chunks between the decode steps.

Rule 1: while a stream runs, a chunk takes about as long as a few steps, longer where many sequences wait and few run.
        With the step behind it, it takes about the stall target at most. Its size in tokens follows the measured times.
Rule 2: where the policy has async_chunks, a chunk is launched, and so is the step behind it, before the chunk is done;
        the next chunk waits for it. The host's work is done meanwhile, and the device does not wait for that.
Rule 3: the prompt served first is the one that would be done first had it started at its arrival. Short prompts pass
        a long one, and the long one still ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, SMALLEST_CHUNK
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.scheduler.chunks import LaunchedChunk
from mlxserver.engine.scheduler.execution import make_prefill_strategy
from mlxserver.engine.scheduler.prompts import PendingPrompt

# Steps that a chunk may take the time of: streams slow down, and none stands still.
_OWN_STEPS, _PEER_STEPS = 3.0, 1.0
_LEAST_SECONDS = 0.016  # of a chunk, however short the steps: a frame of a screen
LEAST_BASES = 2.0  # lower limit of a chunk's time, in units of ChunkTimes.base: of a shorter one, most is overhead
# Without streams there is nothing to stall; only cancellations and new requests wait.
IDLE_STALL_FACTOR = 4
_ASSUMED_TOKEN_SECONDS = 0.001  # until measured
_CHUNKS_MEASURED = 15
_UNLIKE = 1.25  # least ratio of two chunks' lengths for the slope between them to count
_LEAST_SHARE = 0.25  # of a chunk's time that its tokens take, whatever was measured


@dataclass(frozen=True, slots=True)
class ChunkBudget:
    """Budget of the next chunk, from the clock: now by time.monotonic(), most tokens, seconds per token, and whether
    peers stream meanwhile.
    """

    now: float
    tokens: int
    token_seconds: float
    beside_peers: bool


class ChunkTimes:
    """Duration of a chunk: `base` seconds, whatever its length, and `each` per token.

    On a CPU the first is as much as some seventy tokens: a chunk of twice the length takes less than twice the time.
    """

    def __init__(self) -> None:
        self._latest: deque[tuple[int, float]] = deque(maxlen=_CHUNKS_MEASURED)
        self.base, self.each = 0.0, _ASSUMED_TOKEN_SECONDS

    def note(self, tokens: int, seconds: float) -> None:
        """Record the duration of a chunk.

        The line through the latest ones has the median of the slopes between any two that are unlike (Theil 1950, Sen
        1968): some chunks wait for a compilation, or for another process. While all are alike, the base stays.
        """
        self._latest.append((tokens, seconds))
        most = median(seconds / tokens for tokens, seconds in self._latest)
        pairs = combinations(sorted(self._latest), 2)
        slopes = [(longer[1] - one[1]) / (longer[0] - one[0]) for one, longer in pairs if longer[0] >= _UNLIKE * one[0]]
        slope = median(slopes or [(seconds - self.base) / tokens for tokens, seconds in self._latest])
        self.each = min(max(slope, _LEAST_SHARE * most), most)
        self.base = max(0.0, median(seconds - self.each * tokens for tokens, seconds in self._latest))

    def tokens_in(self, seconds: float) -> float:
        """Length in tokens of a chunk that takes so long; zero or less where every chunk takes longer."""
        return (seconds - self.base) / self.each


def waiting_ratio(waiting: int, running: int) -> float:
    """Waiting sequences per running one, at least one.

    With one sequence running and fifteen waiting, chunks of a few of its short steps each would delay the fifteen for
    long, and are the least efficient.
    """
    return max(1.0, waiting / max(1, running))


class Prefill:
    """Processes prompts on one model. stall_target is in seconds; `times` are measured."""

    def __init__(self, model: Any, stall_target: float, policy: ExecutionPolicy | None = None) -> None:
        self._strategy = make_prefill_strategy(model, policy)
        self._stall_target = stall_target
        self._waits = not (policy or current()).async_chunks
        self._under_way: tuple[LaunchedChunk, float] | None = None  # and when it was launched, by time.monotonic()
        self.times = ChunkTimes()

    def budget(self, own_step_seconds: float, peer_step_seconds: float, waiting_ratio: float = 1.0) -> ChunkBudget:
        """Budget of the next chunk, from measured times.

        own_step_seconds, peer_step_seconds: duration of a decode step of this model's streams and of its peers'; 0
        without streams. waiting_ratio: waiting sequences per running one.
        """
        seconds = self._seconds(own_step_seconds, peer_step_seconds, waiting_ratio)
        tokens = min(max(int(self.times.tokens_in(seconds)), SMALLEST_CHUNK), LARGEST_CHUNK)
        return ChunkBudget(time.monotonic(), tokens, self.times.each, peer_step_seconds > 0)

    def _seconds(self, own_step_seconds: float, peer_step_seconds: float, waiting_ratio: float) -> float:
        """Duration of the next chunk. A stream waits for the chunk and for the step behind it."""
        if not (own_step_seconds or peer_step_seconds):
            return IDLE_STALL_FACTOR * self._stall_target
        limits = [max(self._stall_target - own_step_seconds, own_step_seconds)]
        if own_step_seconds:
            limits.append(
                max(_OWN_STEPS * own_step_seconds * waiting_ratio, LEAST_BASES * self.times.base, _LEAST_SECONDS)
            )
        if peer_step_seconds and not self._strategy.yields_cores:
            limits.append(_PEER_STEPS * peer_step_seconds)
        return min(limits)

    def advance(self, prompts: Sequence[PendingPrompt], budget: ChunkBudget) -> None:
        """Process one chunk of these prompts. The device has no other work of this model now; settle() afterwards."""
        self.settle()
        waiting = [prompt for prompt in prompts if prompt.remaining]
        if not waiting:
            return
        # First comes what would be done first had it started at its arrival.
        waiting.sort(key=lambda prompt: prompt.arrived + prompt.remaining * budget.token_seconds)
        if (images := waiting[0].images) and images.encode(waiting[0].done, waiting[0].done + budget.tokens):
            return  # one image at a time: streams go on in between
        if waiting[0].is_scored:
            self._strategy.score(waiting[0], budget.tokens, budget.beside_peers)
            return
        chunk = self._strategy.choose([prompt for prompt in waiting if not prompt.is_scored], budget.tokens)
        started = time.monotonic()
        self._under_way = self._strategy.run(chunk, budget.beside_peers), started
        if self._waits:
            self.settle()

    def settle(self) -> bool:
        """Wait for the chunk under way and measure it; returns whether there was one."""
        if not self._under_way:
            return False
        (chunk, started), self._under_way = self._under_way, None  # with a reference left, it could not be written to
        mx.eval(chunk.last)
        self.times.note(chunk.tokens, time.monotonic() - started)
        return True

    def forget(self) -> None:
        """Forget the chunk under way, which has failed or is of no use any more."""
        self._under_way = None

    def tokens_for(self, length: int) -> int:
        """Tokens of KV cache that a prompt of so many tokens takes while it is processed."""
        return self._strategy.tokens_for(length)

    def bytes_beyond(self, length: int) -> int:
        """Memory that a prompt of so many tokens takes beside its KV cache and what is reserved for chunks."""
        return self._strategy.bytes_beyond(length)

    def shapes(self, length: int) -> Sequence[tuple[int, int, int]]:
        """Shapes of the chunks that prompts of so many tokens have: prompts, tokens of each, capacity of their slots.

        None where any shape will do.
        """
        return self._strategy.shapes(length)

    def rehearse(self, prompts: int, tokens: int, capacity: int) -> None:
        """Compute a chunk of such a shape, and keep nothing of it."""
        self._strategy.rehearse(prompts, tokens, capacity)
