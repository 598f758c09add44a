"""Error envelope of OpenAI's API; the server's own endpoints use it, too."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import orjson

from mlxserver.api.dialect import Failure
from mlxserver.api.openai.field_names import wire_param


def error_object(failure: Failure) -> dict[str, Any]:
    """The envelope as an object. Text from outside (a file's name) may hold surrogates, which JSON has no form for."""
    error = {
        "message": failure.message.encode(errors="backslashreplace").decode(),
        "type": f"{failure.kind}_error",
        "param": wire_param(failure.param),
        "code": failure.code,
    }
    return {"error": error} | ({"projection": asdict(failure.projection)} if failure.projection else {})


def envelope(failure: Failure) -> bytes:
    """The envelope as JSON."""
    return orjson.dumps(error_object(failure))
