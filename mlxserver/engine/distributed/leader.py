"""Leader of the ranks: sends them calls, collects their replies, and handles the loss of a rank.

Rule 1: messages have one order for all models, and every rank processes them in that order, on one thread. So the
        ranks' collective computations match.
Rule 2: once a rank is lost, nothing more is computed together: MLX's group can't be repaired. Every waiter gets
        RankLost at once, and the other ranks are dismissed.
Rule 3: a rank is lost when its link ends, when it is silent, when it fails, and when it stalls. Of several that make no
        step, those that have done the least are stalled: the others wait for them.
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
from mlxserver.engine.distributed.membership import Follower, rank_lost, stalled
from mlxserver.engine.distributed.rendezvous import Rendezvous
from mlxserver.engine.errors import LoadFailed, NoRoom, Projection, RankLost
from mlxserver.engine.loading.sources import Progress
from mlxserver.engine.metrics import RankReport

log = logging.getLogger("ranks")

_REPORT_EVERY = 0.5  # seconds, of a load
_END_SECONDS = 5.0  # that ranks have to end by themselves
_AFTERMATH = 0.5  # seconds within which a rank's loss is noticed after it has made another one fail


@dataclass(frozen=True, slots=True)
class Opened:
    """Rank 0's figures of a model that all ranks have loaded."""

    vocab_size: int
    weight_bytes: int


class Leader:
    """All ranks. silence, step: seconds that a rank may be silent, and be in one step; `step` may be changed."""

    def __init__(self, silence: float, step: float) -> None:
        self.step = step
        self._silence = silence
        self._followers: list[Follower] = []
        self._receivers: list[threading.Thread] = []
        self._own: subprocess.Popen[bytes] | None = None  # the process that computes for rank 0
        self._lost: RankLost | None = None
        self._send_lock = threading.Lock()
        self._loss_lock = threading.Lock()
        self._replies: dict[int, queue.SimpleQueue[Message | RankLost]] = {}  # by the models' numbers
        self._last_number = 0

    # -- start and end ---------------------------------------------------------------------------------------------

    def start(self, facts: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Wait for all ranks. facts: what must be the same on all. Raises RanksDiffer, LinkLost, OSError."""
        self._followers, self._own = Rendezvous(facts, self._silence).start(environ)
        for follower in self._followers:
            follower.link.send({"kind": "welcome"})
            follower.link.heartbeat(dict)
            receiver = threading.Thread(target=self._receive, args=(follower,), name="rank-link", daemon=True)
            receiver.start()
            self._receivers.append(receiver)

    def close(self) -> None:
        """Dismiss the ranks. Every waiter gets RankLost."""
        with self._loss_lock:
            self._lost = self._lost or RankLost("The server has stopped")
        self._end_waiting(self._lost)
        self._dismiss("the server has stopped")
        until = time.monotonic() + _END_SECONDS
        for receiver in self._receivers:
            receiver.join(max(0.0, until - time.monotonic()))
        if self._own:
            self._own.kill()
            self._own.wait()

    # -- messages to the ranks -------------------------------------------------------------------------------------

    @contextmanager
    def loading(self, spec: ModelSpec) -> Iterator[int]:
        """Have all ranks load a model; gives its number. If the block fails, they drop it. Raises RankLost."""
        with self._send_lock:
            self._last_number += 1
            number = self._last_number
            self._replies[number] = queue.SimpleQueue()
        try:
            self.broadcast(number, "load", spec=shared_spec(spec))
            yield number
        except BaseException:
            self.drop(number)
            raise

    def open(self, number: int, key: str, stall_target: float, report: Progress) -> Opened:
        """Wait until all ranks have loaded the model, and have them accept calls.

        Raises LoadFailed, with the rank's reason, NoRoom, RankLost, and what `report` raises.
        """
        replies = []
        for _ in self._followers:  # the first that fails aborts the others' loads
            replies.append(reply := self._loaded(number, report))
            if "projection" in reply:
                where = f"rank {self._followers[reply['rank']].name}"
                raise NoRoom(key, Projection(**reply["projection"]), where)
            if "error" in reply:
                raise LoadFailed(key, f"on rank {reply['rank']}, {reply['error']}")
        # The sizes must be the same on all ranks, because they decide what the prefix caches keep.
        most = {name: max(reply["sizes"][name] for reply in replies) for name in replies[0]["sizes"]}
        self.broadcast(number, "open", sizes=most, stall_target=stall_target)
        own = next(reply for reply in replies if reply["rank"] == 0)
        return Opened(own["vocab_size"], own["weight_bytes"])

    def broadcast(self, number: int, kind: str, **content: Any) -> None:
        """Send all ranks a message about a model. Raises RankLost."""
        with self._send_lock:
            if not self._lost:
                self._send_all({"kind": kind, "number": number, **content})
        if self._lost:
            raise self._lost

    def _loaded(self, number: int, report: Progress) -> Message:
        """A rank's reply to a load; an aborted load ends at the next report."""
        while True:
            report("reading", 0, 0)
            with suppress(queue.Empty):
                return self.receive(number, _REPORT_EVERY)

    def receive(self, number: int, timeout: float | None = None) -> Message:
        """Wait for a rank's message about a model. Raises RankLost, and queue.Empty after `timeout` seconds."""
        message = self._replies[number].get(timeout=timeout)
        if isinstance(message, RankLost):
            self._replies[number].put(message)  # the last one, for every waiter
            raise message
        return message

    def reply(self, message: Mapping[str, Any]) -> None:
        """Send rank 0 alone a message. Raises RankLost."""
        try:
            self._followers[0].link.send(message)
        except LinkLost as error:
            self._lose([self._followers[0]], str(error))
            raise self._lost or RankLost(str(error)) from None

    def drop(self, number: int) -> None:
        """Have all ranks drop a model."""
        with suppress(RankLost):
            self.broadcast(number, "drop")
        self._replies.pop(number, None)

    def _send_all(self, message: Message) -> None:
        for follower in self._followers:
            try:
                follower.link.send(message)
            except LinkLost as error:
                self._lose([follower], str(error))

    # -- state of the ranks----------------------------------------------------------------------------------------

    @property
    def lost(self) -> RankLost | None:
        """The loss after which nothing more is computed together, if there was one."""
        return self._lost

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self._followers)

    def report(self) -> list[RankReport]:
        """The state of every rank, by number."""
        return [follower.report() for follower in self._followers]

    def _receive(self, follower: Follower) -> None:
        """Receive a rank's messages until its link ends."""
        try:
            while True:
                message = follower.link.receive()
                follower.last_message_at = time.monotonic()
                if message["kind"] == "heartbeat":
                    follower.note_heartbeat(message)
                    if lost := stalled(self._followers, self.step):
                        self._lose(lost, f"no step for {self.step:g} s")
                elif message["kind"] == "broken":
                    time.sleep(_AFTERMATH)
                    raise LinkLost(message["reason"])
                elif replies := self._replies.get(message["number"]):
                    replies.put({"rank": follower.rank, **message})
        except Exception as error:  # whatever it is, nothing more is received
            self._lose([follower], str(error))

    def _lose(self, lost: Sequence[Follower], reason: str) -> None:
        """Notify all waiters and dismiss the ranks, once."""
        with self._loss_lock:
            if self._lost:
                return
            for follower in lost:
                follower.error = reason
            self._lost = rank_lost(lost, reason)
        log.error("%s", self._lost)
        self._end_waiting(self._lost)
        if self._own:
            self._own.kill()  # its computation may never end, and hold memory as long
        self._dismiss(str(self._lost))

    def _end_waiting(self, lost: RankLost) -> None:
        for replies in list(self._replies.values()):
            replies.put(lost)

    def _dismiss(self, reason: str) -> None:
        """Have the ranks end; those last that may not read it."""
        for follower in sorted(self._followers, key=lambda follower: follower.error is not None):
            with suppress(LinkLost):
                follower.link.send({"kind": "end", "reason": reason})
                follower.link.finish()
