"""HTTP transport to one server: connects, checks the status, and turns every failure into a ClientError.

Rule 1: what fails before a good status is ServerUnreachable or ApiError; what fails after it is StreamBroken.
Rule 2: a request has no time limit; connecting has one, and so has the silence of an open connection.
Rule 3: the key appears in the Authorization header and nowhere else.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from mlxserver.client.errors import ServerSilent, ServerUnreachable, SettingInvalid, StreamBroken, api_error
from mlxserver.client.recorder import PreparedRequest, Recording, encode_post, record
from mlxserver.client.wire import parse

PROBE_TIMEOUT = 5.0  # seconds


class Transport:
    """Connections to one server, an async context manager. Raises SettingInvalid."""

    def __init__(self, base_url: str, api_key: str, connect_timeout: float | None) -> None:
        self.url = normalise_url(base_url)
        self._headers = _authorization(api_key.strip())
        self._connect_timeout = connect_timeout

    async def __aenter__(self) -> Self:
        # No limit of connections: a comparison opens one for each model.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: Any, read_timeout: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with a good status. read_timeout: seconds that the connection may be silent, None for no limit."""
        url = URL(self.url + path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout, sock_read=read_timeout)
        try:
            response = await self._session.request(method, url, json=body, timeout=timeout)
        except aiohttp.SocketTimeoutError as error:
            raise ServerSilent(self.url, read_timeout or 0, is_there=await self._is_there()) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnreachable(self.url, _cause(error)) from error
        try:
            async with response:
                if response.status >= 400:
                    raise api_error(response.status, await response.text(errors="replace"))
                yield response
        except aiohttp.SocketTimeoutError as error:
            raise StreamBroken(f"the connection is open, but silent for {read_timeout:g} s.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise StreamBroken(f"the connection was lost ({_cause(error)}).") from error

    async def _is_there(self) -> bool:
        """Whether the server answers a request that needs no work."""
        try:
            async with self._session.get(f"{self.url}/models", timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT)):
                return True
        except (aiohttp.ClientError, OSError):
            return False

    async def json(self, method: str, path: str, body: Any, read_timeout: float | None) -> dict[str, Any]:
        """The JSON object of a response. Raises ApiError for anything else, and for an object with an error."""
        async with self.open(method, path, body, read_timeout) as response:
            return await read_object(response)

    def prepare(self, path: str, body: Any, read_timeout: float | None) -> PreparedRequest:
        """Encode a POST whose response is to be recorded, on a connection of its own (client/recorder.py)."""
        url = URL(self.url + path, encoded=True)
        request = encode_post(url, self._headers, json.dumps(body).encode())

        async def send() -> Recording:
            try:
                return await record(url, request, connect=self._connect_timeout, read=read_timeout)
            except OSError as error:
                raise ServerUnreachable(self.url, _cause(error)) from error

        return send


async def read_object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON object of a response. Raises ApiError for anything else, and for an object with an error."""
    received = await response.text(errors="replace")
    answer = parse(received)
    if not isinstance(answer, dict) or answer.get("error"):
        raise api_error(response.status, received)
    return answer


def normalise_url(value: str) -> str:
    """A URL without a path gets /v1; one with a path is taken as it is. Raises SettingInvalid."""
    expected = "a URL such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(value.strip())
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise SettingInvalid("base_url", value, expected) from error
    if not is_usable or parts.query or parts.fragment:
        raise SettingInvalid("base_url", value, expected)
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{quote(path, safe='/%:@')}"


def _authorization(key: str) -> dict[str, str]:
    if not (key.isascii() and key.isprintable()):
        raise SettingInvalid("api_key", "(not shown)", "printable ASCII characters on one line")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _cause(error: BaseException) -> str:
    """The reason of a network failure, without the addresses and codes around it."""
    if isinstance(error, aiohttp.ClientPayloadError):
        return "it ended within the answer"
    system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(system, socket.gaierror):
        return system.strerror or "the name is not known"
    if isinstance(system, OSError) and system.errno:
        return os.strerror(system.errno)
    return str(system) or type(system).__name__
