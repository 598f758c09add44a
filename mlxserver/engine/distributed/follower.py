"""Follower: a computing rank, which processes the leader's messages in their order, on one thread.

Rule 1: the process lives as long as its link to the leader and ends at once with it: its thread may be waiting for a
        lost peer for ever.
Rule 2: a load that fails is reported; after a call that fails the process ends, because the ranks are out of step.
Rule 3: its heartbeats report the progress of that thread, because a thread that waits for ever can't.
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

_DISMISSED, _LEADER_LOST = 0, 1  # exit statuses


def follow(membership: Membership, facts: Mapping[str, str], settings: Settings) -> NoReturn:
    """Follow the leader until the process ends. facts: what must be the same on all ranks.

    Before it begins, raises RanksDiffer, OSError, LinkLost.
    """
    leader, rank, limit = membership.leader, membership.rank, settings.rank_timeout
    link = Link(socket.create_connection((leader.host, leader.port), limit), limit)
    link.send({"kind": "greeting", "rank": rank, "size": membership.size, "token": leader.token, "facts": dict(facts)})
    mailbox = _Mailbox(link)
    work = _Work(membership, settings.memory_limit, link, mailbox)
    link.heartbeat(work.state)
    first = link.receive()
    if first["kind"] == "refused":
        raise RanksDiffer(first["reason"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _wait_for_leader)
    log.info("Rank %d follows %s.", rank, leader.host)
    mailbox.start()
    with streams.thread_stream():
        work.run()


def _wait_for_leader(number: int, frame: object) -> None:
    """The leader gets the signal, too, and dismisses this rank when its requests are done. A second one ends it."""
    log.info("The leader will end this rank; another %s ends it at once.", signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


class _Work:
    """Work of the rank's thread: one message after the other."""

    def __init__(self, membership: Membership, memory_limit: int, link: Link, mailbox: _Mailbox) -> None:
        self._link = link
        self._calls = mailbox.calls
        self._loads = Loads(membership.group, memory_limit, link.send, self._calls.put, self._meanwhile)
        self._models = Models(membership, self._loads, link.send, mailbox.masks.get)
        self._postponed: deque[Message] = deque()  # loads that arrived during another one
        self._done = 0
        self._since: float | None = None  # start of the present message

    def state(self) -> dict[str, Any]:
        """The content of a heartbeat, from any thread."""
        since = self._since
        return {
            "memory_bytes": device.active_bytes(),
            "done": self._done,
            "step_seconds": 0.0 if since is None else time.monotonic() - since,
            "is_reading": self._loads.is_reading,
        }

    def run(self) -> NoReturn:
        """Process messages until the process ends."""
        while True:
            self._act(self._postponed.popleft() if self._postponed else self._calls.get())

    def _meanwhile(self) -> None:
        """Process the messages that arrived since a load began. Another load waits for its end."""
        for _ in range(self._calls.qsize()):
            message = self._calls.get()
            if message["kind"] == "fetched":
                self._postponed.append(message)
            else:
                self._act(message)

    def _act(self, message: Message) -> None:
        # Reading a model is no step, and may take any time.
        outer, self._since = self._since, None if message["kind"] == "fetched" else time.monotonic()
        try:
            self._models.act(message)
        except Exception as error:
            log.exception("This rank has failed and ends")
            with suppress(LinkLost):
                self._link.send({"kind": "broken", "reason": f"{type(error).__name__}: {error}"})
            os._exit(_DISMISSED)
        self._since = outer
        self._done += message["kind"] != "fetched"  # which is not a message of the leader


class _Mailbox:
    """Messages of the leader: calls, and masks, for which a running call waits. Its end is the end of the process."""

    def __init__(self, link: Link) -> None:
        self.calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.masks: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._link = link

    def start(self) -> None:
        """Begin to receive."""
        threading.Thread(target=self._receive, name="rank-link", daemon=True).start()

    def _receive(self) -> None:
        try:
            while (message := self._link.receive())["kind"] != "end":
                if message["kind"] == "mask":
                    self.masks.put(message)
                elif message["kind"] != "heartbeat":
                    self.calls.put(message)
            log.info("This rank ends: %s.", message["reason"].rstrip("."))
            os._exit(_DISMISSED)
        except Exception as error:  # whatever it is, nothing more is received
            log.error("This rank ends, because its leader is lost: %s.", error)
            os._exit(_LEADER_LOST)
