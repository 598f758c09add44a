"""Rendezvous of the ranks: the leader starts the one that computes here, waits for all of them, and compares them."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from mlxserver.engine.distributed.launch import RanksDiffer, RendezvousAddress, compare, leaders_address
from mlxserver.engine.distributed.link import Link, LinkLost, Message
from mlxserver.engine.distributed.membership import Follower

log = logging.getLogger("ranks")

GREETING_SECONDS = 120.0  # within which all ranks have to connect
_POLL_SECONDS = 1.0  # between two checks that the own process is alive


class Rendezvous:
    """Waits for the ranks. facts: what must be the same on all of them. limit: that of the links, in seconds."""

    def __init__(self, facts: Mapping[str, str], limit: float) -> None:
        self._facts = facts
        self._limit = limit
        self._followers: list[Follower] = []

    def start(self, environ: Mapping[str, str]) -> tuple[list[Follower], subprocess.Popen[bytes]]:
        """All ranks, in order, and the process that computes for rank 0. Raises RanksDiffer, LinkLost, OSError."""
        host = leaders_address(environ)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            host, port = listener.getsockname()[:2]
            rendezvous = RendezvousAddress(host, port, secrets.token_hex(16))
            with _Termination() as termination:
                own = subprocess.Popen(sys.orig_argv, env=rendezvous.environment(environ), stdin=subprocess.DEVNULL)
                try:
                    termination.raise_from_now()
                    self._await_all(listener, own, rendezvous.token)
                except BaseException:
                    own.kill()
                    own.wait()
                    raise
        log.info("All %d ranks are connected.", len(self._followers))
        return sorted(self._followers, key=lambda follower: follower.rank), own

    def _await_all(self, listener: socket.socket, own: subprocess.Popen[bytes], token: str) -> None:
        listener.settimeout(_POLL_SECONDS)
        expected, until = 1, time.monotonic() + GREETING_SECONDS
        while len(self._followers) < expected:
            if (status := own.poll()) is not None:
                raise LinkLost(f"the process that computes for rank 0 ended with status {status}")
            if time.monotonic() > until:
                raise LinkLost(f"not all ranks have connected within {GREETING_SECONDS:g} s")
            with suppress(TimeoutError):
                expected = self._greet(*listener.accept(), token) or expected

    def _greet(self, connection: socket.socket, address: tuple[Any, ...], token: str) -> int | None:
        """Admit a rank, and return the number of ranks; close the connection of anything else, and return None."""
        link = Link(connection, self._limit)
        try:
            greeting = link.receive()
            if not secrets.compare_digest(str(greeting.get("token")).encode(), token.encode()):
                raise LinkLost("its token is wrong")
            if greeting["rank"] in [follower.rank for follower in self._followers]:
                raise LinkLost(f"rank {greeting['rank']} is connected already")
        except LinkLost as error:
            log.warning("A connection from %s is no rank's: %s", address[0], error)
            link.close()
            return None
        self._followers.append(Follower(greeting["rank"], str(address[0]), link))
        try:
            compare(greeting["rank"], greeting["facts"], self._facts)
        except RanksDiffer as error:
            for follower in self._followers:
                refuse(follower.link, {"kind": "refused", "reason": str(error)})
            raise
        return int(greeting["size"])


class _Termination:
    """SIGINT and SIGTERM within the block: noted until raise_from_now(), and raised as SystemExit afterwards.

    So a signal never comes between the start of a process and the code that ends it.
    """

    def __init__(self) -> None:
        self._number = 0
        self._raises = False

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def raise_from_now(self) -> None:
        """Raises SystemExit if a signal has come."""
        self._raises = True
        if self._number:
            raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: object) -> None:
        self._number = number
        if self._raises:
            raise SystemExit(128 + number)


def refuse(link: Link, message: Message) -> None:
    """Send the message, and wait until the other side ends the connection."""
    with suppress(LinkLost):
        link.send(message)
        link.finish()
        while True:
            link.receive()
