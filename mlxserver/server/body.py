"""Body of a request: read within its limits of size and time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request

from mlxserver.config.http import HttpSettings

log = logging.getLogger("server")

MAX_IGNORED = 32  # names in one header


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """The whole body. Raises HTTPException: 413 before what is too long is read, 408 if it does not come in time."""
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _read(request, settings.max_body_bytes)
    except TimeoutError:
        seconds = f"{settings.body_timeout:g} seconds"
        message = f"The body took longer than {seconds}, the limit of this server."
        raise HTTPException(408, message, {"Connection": "close"}) from None


def ignored_headers(request: Request, ignored: Sequence[str]) -> dict[str, str]:
    """Response header that names the ignored parameters, if any; the log names them, too."""
    if not ignored:
        return {}
    names = ", ".join(quote(name[:64], safe="", errors="replace") for name in ignored[:MAX_IGNORED])
    log.warning("%s: ignored unknown parameters: %s", request.scope["path"], names)
    return {"x-ignored-parameters": names}


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    declared = request.headers.get("content-length", "")
    too_large = HTTPException(413, f"The body is longer than {limit} bytes, the limit of this server.")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)
