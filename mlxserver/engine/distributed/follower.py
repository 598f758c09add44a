"""A computing rank: it does what the leader says, in that order, on one thread.

Rule 1: it lives as long as its connection to the leader. When that ends, so does the process, at once: its thread may
        wait for ever for a peer that is gone.
Rule 2: a load that fails is an answer; a call that fails is the end, for the ranks are out of step.
Rule 3: its beats say what the thread is at. A thread that waits for ever can't say so itself.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

from mlxserver.config.settings import Settings
from mlxserver.engine.distributed.launch import Membership, RanksDiffer
from mlxserver.engine.distributed.link import Link, LinkLost, Message
from mlxserver.engine.distributed.loads import Loads
from mlxserver.engine.distributed.models import Models
from mlxserver.engine.platform import device, streams

log = logging.getLogger("ranks")

_LET_GO, _LEADER_LOST = 0, 1  # exit statuses


def follow(membership: Membership, facts: Mapping[str, str], settings: Settings) -> NoReturn:
    """Follow the leader until the process ends. facts: what must be the same everywhere.

    Before it begins, raises RanksDiffer, OSError, LinkLost.
    """
    meeting, rank, limit = membership.meeting, membership.rank, settings.rank_timeout
    link = Link(socket.create_connection((meeting.host, meeting.port), limit), limit)
    link.send({"kind": "greeting", "rank": rank, "size": membership.size, "word": meeting.word, "facts": dict(facts)})
    inbox = _Mailbox(link)
    work = _Work(membership, settings.memory_limit, link, inbox)
    link.heartbeat(work.state)
    first = link.receive()
    if first["kind"] == "refused":
        raise RanksDiffer(first["reason"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _wait_for_leader)
    log.info("Rank %d follows %s.", rank, meeting.host)
    inbox.listen()
    with streams.thread_stream():
        work.go_on()


def _wait_for_leader(number: int, frame: object) -> None:
    """The leader gets the signal, too, and lets this rank go when its requests are done. A second one is for good."""
    log.info("The leader has the last word; another %s ends this rank at once.", signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


class _Work:
    """What the rank's thread does: one message after the other."""

    def __init__(self, membership: Membership, memory_limit: int, link: Link, inbox: _Mailbox) -> None:
        self._link = link
        self._calls = inbox.calls
        self._loads = Loads(membership.group, memory_limit, link.send, self._calls.put, self._meanwhile)
        self._models = Models(membership, self._loads, link.send, inbox.masks.get)
        self._postponed: deque[Message] = deque()  # loads that came during another one
        self._done = 0
        self._since: float | None = None  # when it began with the message that it is at

    def state(self) -> dict[str, Any]:
        """For the beats; may be asked from any thread."""
        since = self._since
        return {
            "memory_bytes": device.active_bytes(),
            "done": self._done,
            "step_seconds": 0.0 if since is None else time.monotonic() - since,
            "is_reading": self._loads.is_reading,
        }

    def go_on(self) -> NoReturn:
        """Do what is said, for ever."""
        while True:
            self._act(self._postponed.popleft() if self._postponed else self._calls.get())

    def _meanwhile(self) -> None:
        """Do what was said since a load began. Another load waits for its end."""
        for _ in range(self._calls.qsize()):
            message = self._calls.get()
            if message["kind"] == "fetched":
                self._postponed.append(message)
            else:
                self._act(message)

    def _act(self, message: Message) -> None:
        # A model is read for as long as that takes.
        outer, self._since = self._since, None if message["kind"] == "fetched" else time.monotonic()
        try:
            self._models.act(message)
        except Exception as error:
            log.exception("This rank ends, for it failed")
            with suppress(LinkLost):
                self._link.send({"kind": "broken", "reason": f"{type(error).__name__}: {error}"})
            os._exit(_LET_GO)
        self._since = outer
        self._done += message["kind"] != "fetched"  # which the leader has not said


class _Mailbox:
    """What the leader says: calls, and masks, which a call under way waits for. Its end is the end of the process."""

    def __init__(self, link: Link) -> None:
        self.calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.masks: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._link = link

    def listen(self) -> None:
        """Begin to hear the leader."""
        threading.Thread(target=self._listen, name="rank-link", daemon=True).start()

    def _listen(self) -> None:
        try:
            while (message := self._link.receive())["kind"] != "end":
                if message["kind"] == "mask":
                    self.masks.put(message)
                elif message["kind"] != "heartbeat":
                    self.calls.put(message)
            log.info("This rank ends: %s.", message["reason"].rstrip("."))
            os._exit(_LET_GO)
        except Exception as error:  # whatever it is, the leader is not heard any more
            log.error("This rank ends, for its leader is lost: %s.", error)
            os._exit(_LEADER_LOST)
