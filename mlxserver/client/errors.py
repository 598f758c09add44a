"""Errors of the client, named for what happened.

ClientError
├── SettingInvalid     a setting of the client can't be used; nothing was sent
├── ServerUnreachable  no connection, or no answer on it
├── ServerSilent       the server took a request, and no byte has come for longer than the client waits
├── ApiError           the server answered with an error
│   └── NotSupported   the server does not know this endpoint
├── LoadFailed         a model's load began and failed
├── PullFailed         a model's download began and failed
├── FileUnusable       a local file can't be read or written
└── StreamBroken       an answer began and stopped before its end

Rule: whatever a server sends, a caller gets one of these errors and no other.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlxserver.client.wire import mapping, parse, text

QUOTED_CHARACTERS = 200
DEFAULT_PORT = 8000
MAKEFILE = Path(__file__).parents[2] / "Makefile"  # of a checkout; an installed package has none
KEY_HINT = "Give the server's key with --api-key, or in OPENAI_API_KEY."


class ClientError(Exception):
    """Base of all errors that the client raises."""


class SettingInvalid(ClientError):
    """A setting of the client can't be used."""

    def __init__(self, name: str, value: str, expected: str) -> None:
        given = f"{value!r} is not valid; " if value else ""  # "" is a value that is missing
        super().__init__(f"{name}: {given}expected {expected}{'' if expected.endswith('?') else '.'}")


class ServerUnreachable(ClientError):
    """There is no server at `url`, or it does not answer. cause: which of the two, in words."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"No answer from a server at {url}: {cause}. {start_hint(url)}")
        self.url = url


class ServerSilent(ClientError):
    """The server took a request and has sent nothing for so many seconds. is_there: whether it answers another one."""

    def __init__(self, url: str, seconds: float, *, is_there: bool) -> None:
        state = "is still at work" if is_there else "does not answer other requests either"
        hint = "A streamed answer shows its progress, --max-tokens makes it shorter, --timeout waits longer."
        super().__init__(f"The server at {url} {state}; it has sent nothing for {seconds:g} s. {hint}")


class ApiError(ClientError):
    """The server answered with an error: its own message, and OpenAI's fields where it sent them."""

    def __init__(
        self,
        message: str,
        status: int,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code


class NotSupported(ApiError):
    """The server has no such endpoint: it speaks OpenAI's API without this extension of it."""

    def __init__(self, url: str, path: str, status: int) -> None:
        super().__init__(f"The server at {url} does not support {path} (HTTP {status}).", status)


class LoadFailed(ClientError):
    """A load that the server had begun failed; the message is the server's."""


class PullFailed(ClientError):
    """A download that the server had begun failed; the message is the server's."""


class FileUnusable(ClientError):
    """A file can't be read or written, or does not hold what was expected. cause: which of these, in words."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: {cause}.")


class StreamBroken(ClientError):
    """The answer stopped before its end: the connection was lost, or the server sent an error instead of the rest."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"The answer broke off: {cause}")


def start_hint(url: str) -> str:
    """What to do where no server is: the line that starts one, if it would be on this machine."""
    parts = urlsplit(url)
    other = "--base-url names another one."
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.scheme != "http":
        return other
    port = "" if parts.port == DEFAULT_PORT else f"--port {parts.port or 80}"
    by_make = f' ARGS="{port}"' if port else ""
    command = f"make serve{by_make}" if MAKEFILE.is_file() else f"mlx-server {port}".rstrip()
    return f"Start one with `{command}`; {other}"


def api_error(status: int, body: str) -> ApiError:
    """The error in a body: of OpenAI's error object, of another JSON object, or of plain text."""
    answer = mapping(parse(body))
    fields = mapping(answer.get("error"))
    message = text(fields.get("message")) or text(answer.get("error")) or _described(status, body)
    if status == HTTPStatus.UNAUTHORIZED:
        message = f"{message} {KEY_HINT}"
    return ApiError(message, status, _named(fields, "type"), _named(fields, "param"), _named(fields, "code"))


def stream_error(error: Any) -> StreamBroken:
    """The error of a stream's error event: OpenAI's error object, or any other JSON."""
    return StreamBroken(text(mapping(error).get("message")) or text(error) or json.dumps(error)[:QUOTED_CHARACTERS])


def _described(status: int, body: str) -> str:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown status"
    quoted = " ".join(body.split())[:QUOTED_CHARACTERS]
    if status < HTTPStatus.BAD_REQUEST:
        return f"The server's answer is not what this path should give (HTTP {status}): {quoted or 'nothing'}"
    return f"HTTP {status} ({phrase}): {quoted}" if quoted else f"HTTP {status} ({phrase})."


def _named(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return None if value is None else str(value)
