"""The Batch of a model that several ranks share, as the leader has it: every call is told to all of them.

Rule: the same calls make the same batch everywhere (scheduler/scheduler.py, rule 4). What depends on the clock is
measured on rank 0, and told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from mlxserver.engine.distributed.codec import answer, decode_tokens, encode_rows
from mlxserver.engine.distributed.leader import Leader, Opened
from mlxserver.engine.errors import EngineError
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.sequence import Constraint, Row, RowToken


class LeadingBatch:
    """`number` is the model's, as the ranks know it. `others_step`: as for a Batcher. All methods raise RankLost."""

    def __init__(
        self,
        leader: Leader,
        number: int,
        opened: Opened,
        others_step: Callable[[object], float] = lambda asking: 0.0,
        metrics: ModelMetrics | None = None,
    ) -> None:
        self.vocab_size = opened.vocab_size
        self._leader = leader
        self._number = number
        self._others_step = others_step
        self._metrics = metrics or ModelMetrics("")
        self._rows: dict[int, Constraint | None] = {}
        self._untold: list[list[Any]] = []  # calls that only change what comes next
        self._pace: dict[str, float] = {}
        self._has_prompts = False
        self._step = 0.0

    def insert(self, rows: Sequence[Row]) -> None:
        """Queue rows that share one prompt."""
        self._rows |= {row.id: row.constraint for row in rows}
        self._untold.append(["insert", encode_rows(rows), time.monotonic()])
        self._has_prompts = True

    def remove(self, row_ids: Sequence[int]) -> None:
        """Forget rows."""
        for row_id in row_ids:
            self._rows.pop(row_id, None)
        self._tell("remove", list(row_ids))

    def warm_up(self) -> None:
        """Prepare what prompts need."""
        self._tell("warm_up")

    def decode(self) -> list[RowToken]:
        """Advance every decoding row by one token."""
        self._tell("decode", self._others_step(self))
        while "tokens" not in (told := self._leader.answer(self._number)):
            self._answer(told["row"], told["accepted"])
        self._pace, self._has_prompts, self._step = told["pace"], told["has_prompts"], told["step"]
        if told["rows"]:
            self._metrics.batch_rows.observe(told["rows"])
        return decode_tokens(told["tokens"])

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts."""
        if self._has_prompts and self._pace:
            self._tell("prefill", self._pace)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Give kept prefixes back."""
        self._tell("shrink_prefixes", max_bytes)

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""
        return not self._rows

    def waiting(self) -> set[int]:
        """The ranks know who has no place yet; it matters for restart() alone."""
        return set()

    def streaming_step(self) -> float:
        """Seconds that a step takes for those who stream, as rank 0 measured it last; 0 while nobody does."""
        return self._step if self._rows else 0.0

    def restart(self, staying: Collection[int]) -> list[RowToken]:
        """There is no going on after a call that failed: the ranks are out of step."""
        raise self._leader.lost or EngineError("A call failed that ranks share.")

    def close(self) -> None:
        """Free what the batch holds, on every rank."""
        self._rows = {}
        self._leader.drop(self._number)

    def _tell(self, *call: Any) -> None:
        """Tell a call, after those that were not told yet."""
        calls, self._untold = [*self._untold, [*call]], []
        self._leader.tell(self._number, "calls", calls=calls)

    def _answer(self, row_id: int, accepted: Sequence[int]) -> None:
        """Say what a row may say next."""
        constraint = self._rows.get(row_id)
        self._leader.reply({"kind": "mask", "mask": answer(constraint, accepted) if constraint else None})
