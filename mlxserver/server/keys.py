"""API keys and the permissions that they grant.

Rule: keys are compared by their digests, each with every known one, so that the time taken reveals nothing of them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from enum import IntEnum

from starlette.requests import Request

from mlxserver.config.http import HttpSettings, is_loopback

SCHEME = b"bearer "


class Permission(IntEnum):
    """What a client may do; each includes those before it.

    LOOK: read /health. MANAGE: load and unload models, and read the metrics. NAME_FILES: load models from files of the
    server's machine.
    """

    LOOK = 0
    GENERATE = 1
    MANAGE = 2
    NAME_FILES = 3


class Keys:
    """The keys of a server. Without any, clients on its machine may do everything; others may name no files."""

    def __init__(self, settings: HttpSettings, host: str) -> None:
        self._known = [
            *_digests(settings.api_key, Permission.GENERATE),
            *_digests(settings.admin_key, Permission.NAME_FILES),
        ]
        self._without_key = None
        if not settings.has_keys:
            self._without_key = Permission.NAME_FILES if is_loopback(host) else Permission.MANAGE

    def permission(self, authorization: bytes, api_key: bytes = b"") -> Permission | None:
        """What the values of the headers Authorization and x-api-key grant; None: nothing."""
        return self.identify(authorization, api_key)[0]

    def identify(self, authorization: bytes, api_key: bytes = b"") -> tuple[Permission | None, str]:
        """What the values of both headers grant, and the id of the client that has the key; "" without one."""
        if self._without_key:
            return self._without_key, ""
        is_bearer = authorization[: len(SCHEME)].lower() == SCHEME
        keys = (authorization[len(SCHEME) :] if is_bearer else b"", api_key)
        digests = [hashlib.sha256(key.strip()).digest() for key in keys]
        pairs = [(given, known, permission) for given in digests for known, permission in self._known]
        matches = [(permission, known.hex()) for given, known, permission in pairs if hmac.compare_digest(known, given)]
        return max(matches, default=(None, ""))


class Forbidden(Exception):
    """The client may not do this."""

    def __init__(self, permission: Permission) -> None:
        what = "name files of the server's machine" if permission is Permission.NAME_FILES else "do this"
        super().__init__(f"You may not {what} here without an admin key (see --admin-key).")


def require(request: Request, permission: Permission) -> None:
    """Require a permission of an authenticated request. Raises Forbidden."""
    if request.state.permission < permission:
        raise Forbidden(permission)


def _digests(keys: Iterable[str], permission: Permission) -> list[tuple[bytes, Permission]]:
    return [(hashlib.sha256(key.encode()).digest(), permission) for key in keys]
