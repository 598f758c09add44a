"""API keys and the permissions that they grant.

Rule 1: keys are compared by their digests, each with every known one, so that the time taken reveals nothing of them.
Rule 2: a session token is made from a key, and ends with the key or at its time. It holds nothing of the key, and the
        server keeps nothing for it: it outlives a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from starlette.requests import Request

from mlxserver.config.http import HttpSettings, is_loopback

SCHEME = b"bearer "
SESSION = b"session"
SESSION_SECONDS = 7 * 86_400


class Permission(IntEnum):
    """What a client may do; each includes those before it.

    LOOK: read /health. MANAGE: load and unload models, and read the metrics. NAME_FILES: load models from files of the
    server's machine.
    """

    LOOK = 0
    GENERATE = 1
    MANAGE = 2
    NAME_FILES = 3


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key, as the server keeps it. secret: what its session tokens are signed with."""

    digest: bytes
    permission: Permission
    secret: bytes = field(repr=False)

    def sign(self, expiry: bytes) -> bytes:
        """Signature of a session that ends then, in hexadecimal."""
        return hmac.new(self.secret, SESSION + b"." + expiry, hashlib.sha256).hexdigest().encode()


class Keys:
    """The keys of a server. Without any, clients on its machine may do everything; others may name no files."""

    def __init__(self, settings: HttpSettings, host: str) -> None:
        self._known = [
            *_known(settings.api_key, Permission.GENERATE),
            *_known(settings.admin_key, Permission.NAME_FILES),
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
        pairs = [(given, known) for given in digests for known in self._known]
        matches = [known for given, known in pairs if hmac.compare_digest(known.digest, given)]
        return _best(matches) if matches else self.identify_session(keys[0])

    def identify_session(self, token: bytes) -> tuple[Permission | None, str]:
        """What a session token grants, and the id of the client that has its key; "" without one."""
        if self._without_key:
            return self._without_key, ""
        name, _, rest = token.partition(b".")
        expiry, _, signature = rest.partition(b".")
        is_current = name == SESSION and expiry.isdigit() and len(expiry) < 12 and int(expiry) > time.time()
        signed = [known for known in self._known if hmac.compare_digest(known.sign(expiry), signature)]
        return _best(signed) if is_current else (None, "")

    def session(self, client: str, seconds: float = SESSION_SECONDS) -> str:
        """A session token of the client with this id; "" where there is none."""
        expiry = str(int(time.time() + seconds)).encode()
        tokens = (
            b".".join((SESSION, expiry, each.sign(expiry))) for each in self._known if each.digest.hex() == client
        )
        return next(tokens, b"").decode()


class Forbidden(Exception):
    """The client may not do this."""

    def __init__(self, permission: Permission) -> None:
        what = "name files of the server's machine" if permission is Permission.NAME_FILES else "do this"
        super().__init__(f"You may not {what} here without an admin key (see --admin-key).")


def require(request: Request, permission: Permission) -> None:
    """Require a permission of an authenticated request. Raises Forbidden."""
    if request.state.permission < permission:
        raise Forbidden(permission)


def _best(known: list[KnownKey]) -> tuple[Permission | None, str]:
    return max(((each.permission, each.digest.hex()) for each in known), default=(None, ""))


def _known(keys: Iterable[str], permission: Permission) -> list[KnownKey]:
    digests = ((hashlib.sha256(key.encode()).digest(), key.encode()) for key in keys)
    return [KnownKey(digest, permission, hmac.digest(b"page session", key, "sha256")) for digest, key in digests]
