"""Prompts become keys and values, in chunks between the decode steps.

Rule 1: while anybody streams, a chunk takes about as long as a few steps, longer where many wait and few stream, and
        never longer than the stall target. Its size in tokens follows the measured speed.
Rule 2: the prompt served first is the one that would be done first had it started at its arrival. Short prompts pass
        a long one, and the long one still ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from engine.feeding import Prompt, make_feed
from engine.scores import LARGEST_CHUNK, SMALLEST_CHUNK

# Steps that a chunk may take the time of: streams slow down, and none stands still.
_OWN_STEPS, _OTHERS_STEPS = 3.0, 1.0
# With nobody streaming there is nothing to stall; only cancels and newcomers wait.
_IDLE_STALL_FACTOR = 4
_ASSUMED_SPEED = 1000.0  # prompt tokens a second, until measured
_SPEED_WEIGHT = 0.3  # of a new measurement in the running average


@dataclass(frozen=True, slots=True)
class Pace:
    """What the clock says of the next chunk: the time by time.monotonic(), the seconds that the chunk may take, the
    speed, in prompt tokens a second, and whether other models stream meanwhile.
    """

    now: float
    seconds: float
    speed: float
    beside_others: bool


class Prefill:
    """Processes prompts on one model. stall_target is in seconds; `speed` is in prompt tokens a second, as measured."""

    def __init__(self, model: Any, stall_target: float) -> None:
        self._feed = make_feed(model)
        self._stall_target = stall_target
        self.speed = _ASSUMED_SPEED

    def pace(self, own_step: float, others_step: float) -> Pace:
        """The pace of the next chunk, as measured here.

        own_step, others_step: seconds that a step of those takes who stream from this model and from others, 0 while
        nobody does.
        """
        if not (own_step or others_step):
            return Pace(time.monotonic(), _IDLE_STALL_FACTOR * self._stall_target, self.speed, False)
        others_part = 0.0 if self._feed.gives_way else _OTHERS_STEPS * others_step
        wanted = (_OWN_STEPS * own_step, others_part, self._stall_target)
        return Pace(time.monotonic(), min(seconds for seconds in wanted if seconds), self.speed, others_step > 0)

    def advance(self, prompts: Sequence[Prompt], *, pace: Pace, running: mx.array) -> None:
        """Process one chunk of these prompts. running: the step under way, if any."""
        waiting = [prompt for prompt in prompts if prompt.remaining]
        if not waiting:
            return
        # First comes what would be done first had it started at its arrival.
        waiting.sort(key=lambda prompt: prompt.arrived + prompt.remaining / pace.speed)
        budget = int(min(max(pace.speed * pace.seconds, SMALLEST_CHUNK), LARGEST_CHUNK))
        chunk = self._feed.choose(waiting, budget)
        mx.eval(running)  # it must not count as the chunk's time
        started = time.monotonic()
        self._measure(self._feed.run(chunk, pace.beside_others), time.monotonic() - started)

    def room_for(self, prompt: Prompt) -> int:
        """Tokens that are held for a prompt while it is processed."""
        return self._feed.room_for(prompt)

    def warm_up(self) -> None:
        """Run the shapes that prompts use, so that no prompt pays for what has to be prepared for each."""
        self._feed.warm_up()

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens >= SMALLEST_CHUNK and seconds > 0:
            self.speed += _SPEED_WEIGHT * (tokens / seconds - self.speed)
