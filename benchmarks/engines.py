"""The engines that raw.py drives, behind one small interface."""

from __future__ import annotations

from typing import Any, Protocol

import mlxserver.engine.mlx  # noqa: F401  (prepares the process before mlx_lm imports MLX)

from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence


class Engine(Protocol):
    """Decodes rows together. A row ends when it is removed; removing a row that has ended by itself does nothing."""

    def insert(self, row: Sequence) -> None:
        """Queue a row."""

    def step(self) -> list[int]:
        """Go on by one step; the ids of the rows that got a token."""

    def remove(self, sequence_id: int) -> None:
        """Forget a row that has all its tokens."""

    def close(self) -> None:
        """Free what it holds."""


class MlxLmEngine:
    """mlx-lm's BatchGenerator, as its server uses it. shared: rows of equal settings share one sampler object."""

    def __init__(self, model: Any, rows: int, *, shared: bool) -> None:
        self._generator = BatchGenerator(model, completion_batch_size=rows)
        self._shared = shared
        self._samplers: dict[tuple[float, float], Any] = {}
        self._sequence_ids: dict[int, int] = {}

    def insert(self, row: Sequence) -> None:
        """Queue a row."""
        (uid,) = self._generator.insert(
            [list(row.tokens)], max_tokens=[row.max_tokens], samplers=[self._sampler(row.sampling)]
        )
        self._sequence_ids[uid] = row.id

    def _sampler(self, sampling: SamplingParams) -> Any:
        made = make_sampler(sampling.temperature, top_p=sampling.top_p)
        return self._samplers.setdefault((sampling.temperature, sampling.top_p), made) if self._shared else made

    def step(self) -> list[int]:
        """Go on by one step; the ids of the rows that got a token."""
        _, responses = self._generator.next()
        return [self._sequence_ids[response.uid] for response in responses]

    def remove(self, sequence_id: int) -> None:
        """Nothing to do: its rows end by themselves."""

    def close(self) -> None:
        """Free what it holds."""
        self._generator.close()


class OurEngine:
    """scheduler/scheduler.py, driven as the engine thread drives it."""

    def __init__(self, model: Any, rows: int) -> None:
        self._batch = Scheduler(model, max_running=rows)

    def insert(self, row: Sequence) -> None:
        """Queue a row."""
        self._batch.insert([row])

    def step(self) -> list[int]:
        """Go on by one step; the ids of the rows that got a token."""
        advanced = [token.sequence_id for token in self._batch.decode()]
        self._batch.prefill()
        return advanced

    def remove(self, sequence_id: int) -> None:
        """Forget a row that has all its tokens."""
        self._batch.remove([sequence_id])

    def close(self) -> None:
        """Free what it holds."""
        self._batch.close()
