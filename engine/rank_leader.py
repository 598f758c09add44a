"""The leader: which ranks follow, what they are told, and what happens when one is lost.

Rule 1: what is told has one order for all models, and all ranks do it in that order, on one thread each. So the ranks'
        computations meet.
Rule 2: once a rank is lost, nothing more is computed together: MLX's group can't be mended. Whoever waits is told at
        once, and the other ranks are let go.
"""

from __future__ import annotations

import logging
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from engine.config import ModelSpec
from engine.errors import LoadFailed, RankLost
from engine.rank_gathering import Follower, Gathering
from engine.rank_link import LinkLost, Message
from engine.ranks import RankReport, shared_spec
from engine.sources import Progress

log = logging.getLogger("ranks")

_REPORT_EVERY = 0.5  # seconds, of a load
_LAST_WORDS = 5.0  # seconds that ranks get to end by themselves


@dataclass(frozen=True, slots=True)
class Opened:
    """What rank 0 has of a model that all ranks have loaded."""

    vocab_size: int
    weight_bytes: int


class Leader:
    """All ranks. `limit` is how long one may be silent, in seconds."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._followers: list[Follower] = []
        self._listening: list[threading.Thread] = []
        self._own: subprocess.Popen[bytes] | None = None  # the process that computes for rank 0
        self._lost: RankLost | None = None
        self._telling = threading.Lock()
        self._losing = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[Message | RankLost]] = {}  # to the models, by number
        self._last_number = 0
        self._is_closing = False

    # -- the beginning and the end --------------------------------------------------------------------------------

    def gather(self, facts: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Wait for all ranks. facts: what must be the same everywhere. Raises RanksDiffer, LinkLost, OSError."""
        self._followers, self._own = Gathering(facts, self._limit).start(environ)
        for follower in self._followers:
            follower.link.send({"kind": "welcome"})
            follower.link.beat(dict)
            listening = threading.Thread(target=self._listen, args=(follower,), name="rank-link", daemon=True)
            listening.start()
            self._listening.append(listening)

    def close(self) -> None:
        """Let the ranks go."""
        self._is_closing = True
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

        Raises LoadFailed, with the ranks' reasons, RankLost, and what `report` raises.
        """
        answers = [self._loaded(number, report) for _ in self._followers]
        if failures := {told["error"]: told["rank"] for told in answers if "error" in told}:
            raise LoadFailed(key, "; ".join(f"on rank {rank}, {error}" for error, rank in failures.items()))
        # What a token counts for must be the same everywhere, for it decides what the prefix caches keep.
        most = max(told["token_bytes"] for told in answers)
        self.tell(number, "open", token_bytes=most, stall_target=stall_target)
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
            self._lose(self._followers[0], str(error))
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
                self._lose(follower, str(error))

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
        now = time.monotonic()
        return [RankReport(f.rank, f.address, f.error, f.memory_bytes, now - f.heard) for f in self._followers]

    def _listen(self, follower: Follower) -> None:
        """Take what a rank says, as long as it lives."""
        try:
            while True:
                message = follower.link.receive()
                follower.heard = time.monotonic()
                if message["kind"] == "beat":
                    follower.memory_bytes = message["memory_bytes"]
                elif message["kind"] == "broken":
                    raise LinkLost(message["reason"])
                elif answers := self._answers.get(message["number"]):
                    answers.put({"rank": follower.rank, **message})
        except LinkLost as error:
            self._lose(follower, str(error))

    def _lose(self, follower: Follower, reason: str) -> None:
        """Tell everybody, once."""
        with self._losing:
            if self._lost or self._is_closing:
                return
            follower.error = reason
            self._lost = RankLost(f"Rank {follower.rank} ({follower.address}) is lost: {reason}")
        log.error("%s", self._lost)
        for answers in list(self._answers.values()):
            answers.put(self._lost)
        self._let_go(str(self._lost))
        if self._own:
            self._own.kill()  # what it computes may wait for ever, and hold memory as long

    def _let_go(self, reason: str) -> None:
        for follower in self._followers:
            with suppress(LinkLost):
                follower.link.send({"kind": "end", "reason": reason})
                follower.link.finish()
