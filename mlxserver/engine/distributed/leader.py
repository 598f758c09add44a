"""The leader: which ranks follow, what they are told, and what happens when one is lost.

Rule 1: what is told has one order for all models, and all ranks do it in that order, on one thread each. So the ranks'
        computations meet.
Rule 2: once a rank is lost, nothing more is computed together: MLX's group can't be mended. Whoever waits is told at
        once, and the other ranks are let go.
Rule 3: a rank is lost when its connection ends, when it is silent, when it fails, and when it makes no step. Of several
        that make none, it is those that have done the least: the others wait for them.
"""

from __future__ import annotations

import logging
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.distributed.launch import shared_spec
from mlxserver.engine.distributed.link import LinkLost, Message
from mlxserver.engine.distributed.membership import Follower, loss, stuck
from mlxserver.engine.distributed.rendezvous import Rendezvous
from mlxserver.engine.errors import LoadFailed, NoRoom, Projection, RankLost
from mlxserver.engine.loading.sources import Progress
from mlxserver.engine.metrics import RankReport

log = logging.getLogger("ranks")

_REPORT_EVERY = 0.5  # seconds, of a load
_LAST_WORDS = 5.0  # seconds that ranks get to end by themselves
_AFTERMATH = 0.5  # seconds within which the loss of a rank is known that made another one fail


@dataclass(frozen=True, slots=True)
class Opened:
    """What rank 0 has of a model that all ranks have loaded."""

    vocab_size: int
    weight_bytes: int


class Leader:
    """All ranks. silence, step: the seconds that one may be silent, and be at one step; `step` may be changed."""

    def __init__(self, silence: float, step: float) -> None:
        self.step = step
        self._silence = silence
        self._followers: list[Follower] = []
        self._listening: list[threading.Thread] = []
        self._own: subprocess.Popen[bytes] | None = None  # the process that computes for rank 0
        self._lost: RankLost | None = None
        self._telling = threading.Lock()
        self._losing = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[Message | RankLost]] = {}  # to the models, by number
        self._last_number = 0

    # -- the beginning and the end --------------------------------------------------------------------------------

    def gather(self, facts: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Wait for all ranks. facts: what must be the same everywhere. Raises RanksDiffer, LinkLost, OSError."""
        self._followers, self._own = Rendezvous(facts, self._silence).start(environ)
        for follower in self._followers:
            follower.link.send({"kind": "welcome"})
            follower.link.heartbeat(dict)
            listening = threading.Thread(target=self._listen, args=(follower,), name="rank-link", daemon=True)
            listening.start()
            self._listening.append(listening)

    def close(self) -> None:
        """Let the ranks go. Whoever still waits for them is told."""
        with self._losing:
            self._lost = self._lost or RankLost("The server has stopped")
        self._end_waiting(self._lost)
        self._let_go("the server has stopped")
        until = time.monotonic() + _LAST_WORDS
        for listening in self._listening:
            listening.join(max(0.0, until - time.monotonic()))
        if self._own:
            self._own.kill()
            self._own.wait()

    # -- what the ranks are told ----------------------------------------------------------------------------------

    @contextmanager
    def loading(self, spec: ModelSpec) -> Iterator[int]:
        """Make all ranks load a model; its number. If the block fails, they forget it. Raises RankLost."""
        with self._telling:
            self._last_number += 1
            number = self._last_number
            self._answers[number] = queue.SimpleQueue()
        try:
            self.tell(number, "load", spec=shared_spec(spec))
            yield number
        except BaseException:
            self.drop(number)
            raise

    def open(self, number: int, key: str, stall_target: float, report: Progress) -> Opened:
        """Wait until all ranks have loaded the model, and make them ready for calls.

        Raises LoadFailed, with the rank's reason, NoRoom, RankLost, and what `report` raises.
        """
        answers = []
        for _ in self._followers:  # the first that can't calls the others' loads off
            answers.append(told := self._loaded(number, report))
            if "projection" in told:
                where = f"rank {self._followers[told['rank']].name}"
                raise NoRoom(key, Projection(**told["projection"]), where)
            if "error" in told:
                raise LoadFailed(key, f"on rank {told['rank']}, {told['error']}")
        # What a token counts for must be the same everywhere, for it decides what the prefix caches keep.
        most = max(told["bytes_per_token"] for told in answers)
        self.tell(number, "open", bytes_per_token=most, stall_target=stall_target)
        own = next(told for told in answers if told["rank"] == 0)
        return Opened(own["vocab_size"], own["weight_bytes"])

    def tell(self, number: int, kind: str, **content: Any) -> None:
        """Tell all ranks something of a model. Raises RankLost."""
        with self._telling:
            if not self._lost:
                self._tell_all({"kind": kind, "number": number, **content})
        if self._lost:
            raise self._lost

    def _loaded(self, number: int, report: Progress) -> Message:
        """What a rank says of its load; a load that is called off ends at the next report."""
        while True:
            report("reading", 0, 0)
            with suppress(queue.Empty):
                return self.answer(number, _REPORT_EVERY)

    def answer(self, number: int, timeout: float | None = None) -> Message:
        """Wait for what a rank says of a model. Raises RankLost, and queue.Empty after `timeout` seconds."""
        told = self._answers[number].get(timeout=timeout)
        if isinstance(told, RankLost):
            self._answers[number].put(told)  # it is the last word, for everybody
            raise told
        return told

    def reply(self, message: Mapping[str, Any]) -> None:
        """Tell rank 0 alone. Raises RankLost."""
        try:
            self._followers[0].link.send(message)
        except LinkLost as error:
            self._lose([self._followers[0]], str(error))
            raise self._lost or RankLost(str(error)) from None

    def drop(self, number: int) -> None:
        """Make all ranks forget a model."""
        with suppress(RankLost):
            self.tell(number, "drop")
        self._answers.pop(number, None)

    def _tell_all(self, message: Message) -> None:
        for follower in self._followers:
            try:
                follower.link.send(message)
            except LinkLost as error:
                self._lose([follower], str(error))

    # -- who is there ---------------------------------------------------------------------------------------------

    @property
    def lost(self) -> RankLost | None:
        """Why nothing is computed together any more."""
        return self._lost

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self._followers)

    def report(self) -> list[RankReport]:
        """How every rank is, by number."""
        return [follower.report() for follower in self._followers]

    def _listen(self, follower: Follower) -> None:
        """Take what a rank says, as long as it lives."""
        try:
            while True:
                message = follower.link.receive()
                follower.heard = time.monotonic()
                if message["kind"] == "heartbeat":
                    follower.note_heartbeat(message)
                    if standing := stuck(self._followers, self.step):
                        self._lose(standing, f"no step for {self.step:g} s")
                elif message["kind"] == "broken":
                    time.sleep(_AFTERMATH)
                    raise LinkLost(message["reason"])
                elif answers := self._answers.get(message["number"]):
                    answers.put({"rank": follower.rank, **message})
        except Exception as error:  # whatever it is, this rank is not heard any more
            self._lose([follower], str(error))

    def _lose(self, lost: Sequence[Follower], reason: str) -> None:
        """Tell everybody, once."""
        with self._losing:
            if self._lost:
                return
            for follower in lost:
                follower.error = reason
            self._lost = loss(lost, reason)
        log.error("%s", self._lost)
        self._end_waiting(self._lost)
        if self._own:
            self._own.kill()  # what it computes may wait for ever, and hold memory as long
        self._let_go(str(self._lost))

    def _end_waiting(self, lost: RankLost) -> None:
        for answers in list(self._answers.values()):
            answers.put(lost)

    def _let_go(self, reason: str) -> None:
        """Make the ranks end; those last that may not listen."""
        for follower in sorted(self._followers, key=lambda follower: follower.error is not None):
            with suppress(LinkLost):
                follower.link.send({"kind": "end", "reason": reason})
                follower.link.finish()
