"""Batch of a model that several ranks share, on the leader: every call is sent to all of them.

Rule: the same calls make the same batch on every rank (scheduler/scheduler.py, rule 4). What depends on the clock is
measured on rank 0 and sent with the calls.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Collection, Iterator
from typing import Any

from mlxserver.engine.distributed.codec import answer, decode_tokens, encode_sequences
from mlxserver.engine.distributed.leader import Leader, Opened
from mlxserver.engine.errors import EngineError
from mlxserver.engine.metrics import EngineLoad, ModelMetrics
from mlxserver.engine.requests import Execution
from mlxserver.engine.scheduler.peers import FixedPeers, Peers
from mlxserver.engine.sequence import Constraint, SampledToken, Sequence


class LeadingBatch:
    """Sends a Scheduler's calls to the ranks. number: the model's, among the ranks. peers, load: as a Scheduler's.

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
        self.execution: Execution | None = None
        self.reserved_kv_bytes: int | None = None
        self._leader = leader
        self._number = number
        self._peers = peers or FixedPeers()
        self._metrics = metrics or ModelMetrics("")
        self._constraints: dict[int, Constraint | None] = {}
        self._unsent: list[list[Any]] = []  # calls that only change what comes next
        self._chunk_budget: dict[str, float] = {}
        self._has_prompts = False
        self._is_warm = False

    def insert(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue the sequences of one request."""
        self._constraints |= {sequence.id: sequence.constraint for sequence in sequences}
        if progress := sequences[0].progress:  # all share one
            progress.state = None  # the ranks know it, and do not report it
        self._unsent.append(["insert", encode_sequences(sequences), time.monotonic()])
        self._has_prompts = True
        self.load.is_busy = True

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences."""
        for sequence_id in sequence_ids:
            self._constraints.pop(sequence_id, None)
        if not self._constraints:
            self._note_idle()
        self._send("remove", list(sequence_ids))

    def longest(self, most: int) -> int:
        """All of them: the ranks have reserved their KV cache."""
        return most

    def warm_up(self, longest: int) -> Iterator[None]:
        """Have the ranks compute shapes that requests will use, one per step of the iterator.

        longest: tokens of the longest sequence, as the ranks know it, too.
        """
        while not self._is_warm:
            self._send("warm_up")
            self.decode()  # its reply comes behind the shape
            yield

    def decode(self) -> list[SampledToken]:
        """Advance every running sequence by one token."""
        self._send("decode", self._peers.observe(self.load))
        while "tokens" not in (reply := self._leader.receive(self._number)):
            self._answer(reply["sequence"], reply["accepted"])
        self._chunk_budget, self._has_prompts = reply["chunk_budget"], reply["has_prompts"]
        self._is_warm = reply["is_warm"]
        if self._constraints:
            self.load.num_running, self.load.step_seconds = reply["running"], reply["step_seconds"]
        if reply["decoding"]:
            self._metrics.batch_size.observe(reply["decoding"])
        return decode_tokens(reply["tokens"])

    def prefill(self) -> None:
        """Process one chunk of the waiting prompts."""
        if self._has_prompts and self._chunk_budget:
            self._send("prefill", self._chunk_budget)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Shrink the prefix caches."""
        self._send("shrink_prefixes", max_bytes)

    def is_empty(self) -> bool:
        """Whether no sequence is waiting or running."""
        return not self._constraints

    def waiting(self) -> set[int]:
        """Empty: the ranks know the waiting sequences, and only restart() needs them."""
        return set()

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """Raises: after a call that failed, the ranks are out of step."""
        raise self._leader.lost or EngineError("A call failed that ranks share.")

    def close(self) -> None:
        """Free the batch on every rank."""
        self._constraints = {}
        self._note_idle()
        self._leader.drop(self._number)

    def _note_idle(self) -> None:
        self.load.is_busy, self.load.num_running, self.load.step_seconds = False, 0, 0.0

    def _send(self, *call: Any) -> None:
        """Send a call, after those that have not been sent yet."""
        calls, self._unsent = [*self._unsent, [*call]], []
        self._leader.broadcast(self._number, "calls", calls=calls)

    def _answer(self, sequence_id: int, accepted: abc.Sequence[int]) -> None:
        """Reply with the token mask of a sequence."""
        constraint = self._constraints.get(sequence_id)
        self._leader.reply({"kind": "mask", "mask": answer(constraint, accepted) if constraint else None})
