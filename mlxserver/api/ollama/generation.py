"""Dialects of POST /api/chat and /api/generate."""

from __future__ import annotations

from typing import ClassVar

from mlxserver.api.dialect import Call
from mlxserver.api.ollama.encoder import LineEncoder
from mlxserver.api.ollama.names import names_of
from mlxserver.api.ollama.requests import AnsweringRequest, OllamaChatRequest, OllamaGenerateRequest
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import parse
from mlxserver.config.settings import Settings


class LineDialect:
    """What both share. A call with nothing to answer loads the model, or unloads it if it is to stay for no time."""

    schema: ClassVar[type[AnsweringRequest]]

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a request. Raises ValidationFailed."""
        request = parse(self.schema, body, self._limits)
        asked = request.generation_requests
        encoder = LineEncoder(
            request.model,
            is_chat=self.schema is OllamaChatRequest,
            has_logprobs=request.logprobs,
            load_reason="" if asked else "unload" if request.keep_alive == 0 else "load",
        )
        name, *other_names = names_of(request.model)
        return Call(
            name,
            asked,
            encoder,
            streams=request.stream,
            idle_timeout=request.keep_alive,
            ignored=request.all_ignored,
            other_names=other_names,
        )


class OllamaChatDialect(LineDialect):
    """Dialect of POST /api/chat."""

    schema = OllamaChatRequest


class OllamaGenerateDialect(LineDialect):
    """Dialect of POST /api/generate."""

    schema = OllamaGenerateRequest
