"""Who a key makes its bearer.

Rule: keys are compared by their digests, each with every known one, so that time tells nothing of them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from enum import IntEnum

from starlette.requests import Request

from mlxserver.config.http import HttpSettings, is_loopback

SCHEME = b"bearer "


class Right(IntEnum):
    """What a client may do; each may do what comes before it, too.

    LOOK: see that the server lives. MANAGE: load and unload, and see the metrics. NAME_FILES: say which files of this
    machine to load.
    """

    LOOK = 0
    GENERATE = 1
    MANAGE = 2
    NAME_FILES = 3


class Keys:
    """The keys of a server. Without any, all_instances on its machine may do everything; others may name no files."""

    def __init__(self, settings: HttpSettings, host: str) -> None:
        self._known = [
            *_digests(settings.api_key, Right.GENERATE),
            *_digests(settings.admin_key, Right.NAME_FILES),
        ]
        self._without = None
        if not settings.has_keys:
            self._without = Right.NAME_FILES if is_loopback(host) else Right.MANAGE

    def right(self, authorization: bytes) -> Right | None:
        """What the value of an Authorization header entitles to; None: to nothing."""
        if self._without:
            return self._without
        is_bearer = authorization[: len(SCHEME)].lower() == SCHEME
        given = hashlib.sha256(authorization[len(SCHEME) :].strip()).digest()
        matches = [right for digest, right in self._known if hmac.compare_digest(digest, given)]
        return max(matches) if matches and is_bearer else None


class Forbidden(Exception):
    """The client may not do this."""

    def __init__(self, right: Right) -> None:
        what = "name files of the server's machine" if right is Right.NAME_FILES else "do this"
        super().__init__(f"You may not {what} here without an admin key (see --admin-key).")


def demand(request: Request, right: Right) -> None:
    """Let a request that the gate let in go on if it has this right. Raises Forbidden."""
    if request.state.right < right:
        raise Forbidden(right)


def _digests(keys: Iterable[str], right: Right) -> list[tuple[bytes, Right]]:
    return [(hashlib.sha256(key.encode()).digest(), right) for key in keys]
