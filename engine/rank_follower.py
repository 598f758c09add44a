"""A computing rank: it does what the leader says, in that order, on one thread.

Rule 1: it lives as long as its connection to the leader. When that ends, so does the process, at once: its thread may
        wait for ever for a peer that is gone.
Rule 2: a load that fails is an answer; a call that fails is the end, for the ranks are out of step.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping
from typing import NoReturn

from engine import device, runtime
from engine.rank_link import Link, LinkLost, Message
from engine.rank_models import Models
from engine.ranks import Membership, RanksDiffer

log = logging.getLogger("ranks")

_LET_GO, _LEADER_LOST = 0, 1  # exit statuses


def follow(membership: Membership, facts: Mapping[str, str], limit: float) -> NoReturn:
    """Follow the leader until the process ends. Before it begins, raises RanksDiffer, OSError, LinkLost.

    facts: what must be the same everywhere. limit: how long the leader may be silent, in seconds.
    """
    meeting, rank = membership.meeting, membership.rank
    link = Link(socket.create_connection((meeting.host, meeting.port), limit), limit)
    link.send({"kind": "greeting", "rank": rank, "size": membership.size, "word": meeting.word, "facts": dict(facts)})
    link.beat(lambda: {"memory_bytes": device.active_bytes()})
    first = link.receive()
    if first["kind"] == "refused":
        raise RanksDiffer(first["reason"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _wait_for_leader)
    inbox = _Inbox(link)
    log.info("Rank %d follows %s.", rank, meeting.host)
    with runtime.thread_stream():
        _work(Models(membership, link.send, inbox.masks.get), inbox.calls, link)


def _wait_for_leader(number: int, frame: object) -> None:
    """The leader gets the signal, too, and lets this rank go when its requests are done. A second one is for good."""
    log.info("The leader has the last word; another %s ends this rank at once.", signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


def _work(models: Models, calls: queue.SimpleQueue[Message], link: Link) -> NoReturn:
    """Do what is said, for ever."""
    while True:
        message = calls.get()
        try:
            models.act(message)
        except Exception as error:
            log.exception("This rank ends, for it failed")
            link.send({"kind": "broken", "reason": f"{type(error).__name__}: {error}"})
            os._exit(_LET_GO)


class _Inbox:
    """What the leader says: calls, and masks, which a call under way waits for. Its end is the end of the process."""

    def __init__(self, link: Link) -> None:
        self.calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.masks: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._link = link
        threading.Thread(target=self._listen, name="rank-link", daemon=True).start()

    def _listen(self) -> None:
        try:
            while (message := self._link.receive())["kind"] != "end":
                if message["kind"] == "mask":
                    self.masks.put(message)
                elif message["kind"] != "beat":
                    self.calls.put(message)
            log.info("This rank ends: %s.", message["reason"].rstrip("."))
            os._exit(_LET_GO)
        except LinkLost as error:
            log.error("This rank ends, for its leader is lost: %s.", error)
            os._exit(_LEADER_LOST)
