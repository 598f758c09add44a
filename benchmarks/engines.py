"""Engines that raw.py measures in-process, behind one small interface."""

from __future__ import annotations

from typing import Any, Protocol

import mlxserver.engine.mlx  # noqa: F401  (prepares the process before mlx_lm imports MLX)

from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence


class Engine(Protocol):
    """Continuous batching of sequences. A sequence ends when it is removed, or by itself."""

    def insert(self, sequence: Sequence) -> None:
        """Queue a sequence."""

    def step(self) -> list[int]:
        """Run one decode step; the ids of the sequences that got a token."""

    def remove(self, sequence_id: int) -> None:
        """Remove a sequence that has all its tokens."""

    def close(self) -> None:
        """Free the KV cache."""


class MlxLmEngine:
    """mlx-lm's BatchGenerator, as its server uses it. shared: sequences of equal settings share one sampler object."""

    def __init__(self, model: Any, max_running: int, *, shared: bool) -> None:
        self._generator = BatchGenerator(model, completion_batch_size=max_running)
        self._shared = shared
        self._samplers: dict[tuple[float, float], Any] = {}
        self._sequence_ids: dict[int, int] = {}

    def insert(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        (uid,) = self._generator.insert(
            [list(sequence.tokens)], max_tokens=[sequence.max_tokens], samplers=[self._sampler(sequence.sampling)]
        )
        self._sequence_ids[uid] = sequence.id

    def _sampler(self, sampling: SamplingParams) -> Any:
        made = make_sampler(sampling.temperature, top_p=sampling.top_p)
        return self._samplers.setdefault((sampling.temperature, sampling.top_p), made) if self._shared else made

    def step(self) -> list[int]:
        """Run one decode step; the ids of the sequences that got a token."""
        _, responses = self._generator.next()
        return [self._sequence_ids[response.uid] for response in responses]

    def remove(self, sequence_id: int) -> None:
        """Nothing to do: BatchGenerator removes a sequence that has all its tokens."""

    def close(self) -> None:
        """Free the KV cache."""
        self._generator.close()


class OurEngine:
    """This server's Scheduler, stepped as the engine thread steps it."""

    def __init__(self, model: Any, max_running: int) -> None:
        self._scheduler = Scheduler(model, max_running=max_running)

    def insert(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._scheduler.insert([sequence])

    def step(self) -> list[int]:
        """Run one decode step; the ids of the sequences that got a token."""
        advanced = [token.sequence_id for token in self._scheduler.decode()]
        self._scheduler.prefill()
        return advanced

    def remove(self, sequence_id: int) -> None:
        """Remove a sequence that has all its tokens."""
        self._scheduler.remove([sequence_id])

    def close(self) -> None:
        """Free the KV cache."""
        self._scheduler.close()
