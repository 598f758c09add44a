"""Body of a request: read within its limits of size and time, whatever its coding, as JSON in UTF-8."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request

from mlxserver.config.http import HttpSettings
from mlxserver.server.content_coding import ContentDecoder, in_utf8

log = logging.getLogger("server")

MAX_IGNORED = 32  # names in one header


async def read_body(request: Request, settings: HttpSettings, most: int | None = None) -> bytes:
    """The whole body, decoded. most: its bytes at most, if that is less than max_body_bytes.

    Raises HTTPException: 413 before what is too long is read or decoded, 408 if it does not come in time, 415 for an
    unknown coding or charset, 400 for what is not in the coding or the charset it should be.
    """
    limit = settings.max_body_bytes if most is None else min(most, settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _read(request, limit)
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
    decoder = ContentDecoder(request.headers.get("content-encoding", ""))
    async for received in request.stream():
        for part in decoder.feed(received):
            body += part
            if len(body) > limit:
                raise too_large
            if part is not received:
                await asyncio.sleep(0)  # a small body may decode to a large one: other clients go on meanwhile
    decoder.end()
    text = in_utf8(bytes(body), request.headers.get("content-type", ""))
    if len(text) > limit:
        raise too_large
    return text
