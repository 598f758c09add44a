"""The Batch of a model that several ranks share, as the leader has it: every call is told to all of them.

Rule: the same calls make the same batch everywhere (scheduler/scheduler.py, rule 4). What depends on the clock is
measured on rank 0, and told.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Collection
from typing import Any

from mlxserver.engine.distributed.codec import answer, decode_tokens, encode_sequences
from mlxserver.engine.distributed.leader import Leader, Opened
from mlxserver.engine.errors import EngineError
from mlxserver.engine.metrics import EngineLoad, ModelMetrics
from mlxserver.engine.scheduler.peers import FixedPeers, Peers
from mlxserver.engine.sequence import Constraint, SampledToken, Sequence


class LeadingBatch:
    """`number` is the model's, as the ranks know it. `peers` and `load` as a Scheduler's.

    All methods raise RankLost.
    """

    def __init__(
        self,
        leader: Leader,
        number: int,
        opened: Opened,
        peers: Peers | None = None,
        metrics: ModelMetrics | None = None,
    ) -> None:
        self.vocab_size = opened.vocab_size
        self.load = EngineLoad()
        self._leader = leader
        self._number = number
        self._peers = peers or FixedPeers()
        self._metrics = metrics or ModelMetrics("")
        self._rows: dict[int, Constraint | None] = {}
        self._unpublished: list[list[Any]] = []  # calls that only change what comes next
        self._chunk_budget: dict[str, float] = {}
        self._has_prompts = False

    def insert(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue the sequences of one request."""
        self._rows |= {sequence.id: sequence.constraint for sequence in sequences}
        self._unpublished.append(["insert", encode_sequences(sequences), time.monotonic()])
        self._has_prompts = True
        self.load.is_busy = True

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Forget rows."""
        for sequence_id in sequence_ids:
            self._rows.pop(sequence_id, None)
        if not self._rows:
            self._note_idle()
        self._tell("remove", list(sequence_ids))

    def warm_up(self) -> None:
        """Prepare what prompts need."""
        self._tell("warm_up")

    def decode(self) -> list[SampledToken]:
        """Advance every decoding row by one token."""
        self._tell("decode", self._peers.observe(self.load))
        while "tokens" not in (told := self._leader.answer(self._number)):
            self._answer(told["row"], told["accepted"])
        self._chunk_budget, self._has_prompts = told["chunk_budget"], told["has_prompts"]
        if self._rows:
            self.load.num_running, self.load.step_seconds = told["running"], told["step_seconds"]
        if told["decoding"]:
            self._metrics.batch_size.observe(told["decoding"])
        return decode_tokens(told["tokens"])

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts."""
        if self._has_prompts and self._chunk_budget:
            self._tell("prefill", self._chunk_budget)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Give kept prefixes back."""
        self._tell("shrink_prefixes", max_bytes)

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""
        return not self._rows

    def waiting(self) -> set[int]:
        """The ranks know who has no group yet; it matters for restart() alone."""
        return set()

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """There is no going on after a call that failed: the ranks are out of step."""
        raise self._leader.lost or EngineError("A call failed that ranks share.")

    def close(self) -> None:
        """Free what the batch holds, on every rank."""
        self._rows = {}
        self._note_idle()
        self._leader.drop(self._number)

    def _note_idle(self) -> None:
        self.load.is_busy, self.load.num_running, self.load.step_seconds = False, 0, 0.0

    def _tell(self, *call: Any) -> None:
        """Tell a call, after those that were not told yet."""
        calls, self._unpublished = [*self._unpublished, [*call]], []
        self._leader.tell(self._number, "calls", calls=calls)

    def _answer(self, sequence_id: int, accepted: abc.Sequence[int]) -> None:
        """Say what a row may say next."""
        constraint = self._rows.get(sequence_id)
        self._leader.reply({"kind": "mask", "mask": answer(constraint, accepted) if constraint else None})
