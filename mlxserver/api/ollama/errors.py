"""Error envelope of Ollama's API: the message and nothing else, as a body and as the last line of a stream."""

from __future__ import annotations

import orjson

from mlxserver.api.dialect import Api, Failure

LINES = "application/x-ndjson"


def envelope(failure: Failure) -> bytes:
    """The envelope as JSON. Text from outside (a file's name) may hold surrogates, which JSON has no form for."""
    return orjson.dumps({"error": failure.message.encode(errors="backslashreplace").decode()})


OLLAMA = Api("ollama", envelope, "OllamaError", prefix="/api/", stream_media=LINES)
