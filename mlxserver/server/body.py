"""A request's body, within its limits of size and time."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from mlxserver.config.http import HttpSettings


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """The whole body. Raises HTTPException: 413 before what is too long is read, 408 if it does not come in time."""
    try:
        async with asyncio.timeout(settings.body_timeout):
            return await _read(request, settings.max_body_bytes)
    except TimeoutError:
        seconds = f"{settings.body_timeout:g} seconds"
        message = f"The body took longer than {seconds}, the limit of this server."
        raise HTTPException(408, message, {"Connection": "close"}) from None


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
