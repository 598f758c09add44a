"""Prompts become keys and values, in chunks between the decode steps.

Rule 1: while anybody streams, a chunk takes about as long as a few steps, longer where many wait and few stream. With
        the step behind it, it takes about the stall target at most. Its size in tokens follows the measured times.
Rule 2: the prompt served first is the one that would be done first had it started at its arrival. Short prompts pass
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

from mlxserver.engine.platform.attention_memory import LARGEST_CHUNK, SMALLEST_CHUNK
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.chunks import PendingPrompt, make_prefill_strategy

# Steps that a chunk may take the time of: streams slow down, and none stands still.
_OWN_STEPS, _OTHERS_STEPS = 3.0, 1.0
_BASES = 2.0  # and how often it takes at least what every chunk takes: of a shorter one, most would be lost
# With nobody streaming there is nothing to stall; only cancels and newcomers wait.
_IDLE_STALL_FACTOR = 4
_ASSUMED_TOKEN_SECONDS = 0.001  # until measured
_CHUNKS_MEASURED = 15
_UNLIKE = 1.25  # how much longer a chunk must be than another for the two to tell what a token takes
_LEAST_SHARE = 0.25  # of a chunk's time that its tokens take, whatever was measured


@dataclass(frozen=True, slots=True)
class ChunkBudget:
    """What the clock says of the next chunk: the time by time.monotonic(), how many tokens it may have, the seconds
    that each of them takes, and whether other models stream meanwhile.
    """

    now: float
    tokens: int
    token_seconds: float
    beside_others: bool


class ChunkTimes:
    """How long a chunk takes: `base` seconds, whatever its length, and `each` for every token of it.

    On a CPU the first is as much as some seventy tokens: a chunk of twice the length is no chunk of twice the time.
    """

    def __init__(self) -> None:
        self._latest: deque[tuple[int, float]] = deque(maxlen=_CHUNKS_MEASURED)
        self.base, self.each = 0.0, _ASSUMED_TOKEN_SECONDS

    def note(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long.

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
        """How many tokens a chunk has that takes so long; none, or fewer, where no chunk is that short."""
        return (seconds - self.base) / self.each


class Prefill:
    """Processes prompts on one model. stall_target is in seconds; `times` are measured."""

    def __init__(self, model: Any, stall_target: float, policy: ExecutionPolicy | None = None) -> None:
        self._strategy = make_prefill_strategy(model, policy)
        self._stall_target = stall_target
        self.times = ChunkTimes()

    def pace(self, own_step_seconds: float, peer_step_seconds: float, waiting_ratio: float = 1.0) -> ChunkBudget:
        """The budget of the next chunk, from measured times.

        own_step_seconds, peer_step_seconds: duration of a decode step of this model's streams and of other models'; 0
        without streams. waiting_ratio: waiting sequences per running one.
        """
        seconds = _IDLE_STALL_FACTOR * self._stall_target
        if own_step_seconds or peer_step_seconds:
            # A stream waits for the chunk and for the step behind it.
            own_part = (
                max(_OWN_STEPS * own_step_seconds * waiting_ratio, _BASES * self.times.base)
                if own_step_seconds
                else 0.0
            )
            wanted = (own_part, 0.0 if self._strategy.yields_cores else _OTHERS_STEPS * peer_step_seconds)
            longest = max(self._stall_target - own_step_seconds, own_step_seconds)
            seconds = min([*filter(None, wanted), longest])
        tokens = min(max(int(self.times.tokens_in(seconds)), SMALLEST_CHUNK), LARGEST_CHUNK)
        return ChunkBudget(time.monotonic(), tokens, self.times.each, peer_step_seconds > 0)

    def advance(self, prompts: Sequence[PendingPrompt], pace: ChunkBudget) -> None:
        """Process one chunk of these prompts. The device has nothing else of this model's to do meanwhile."""
        waiting = [prompt for prompt in prompts if prompt.remaining]
        if not waiting:
            return
        # First comes what would be done first had it started at its arrival.
        waiting.sort(key=lambda prompt: prompt.arrived + prompt.remaining * pace.token_seconds)
        chunk = self._strategy.choose(waiting, pace.tokens)
        started = time.monotonic()
        tokens = self._strategy.run(chunk, pace.beside_others)
        self.times.note(tokens, time.monotonic() - started)

    def tokens_for(self, prompt: PendingPrompt) -> int:
        """Tokens that are held for a prompt while it is processed."""
        return self._strategy.tokens_for(prompt)

    def warm_up(self) -> None:
        """Run the shapes that prompts use, so that no prompt pays for what has to be prepared for each."""
        self._strategy.warm_up()
