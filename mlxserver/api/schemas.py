"""The requests that the server takes, each parameter declared once.

Rule 1: what is declared is honoured, or says in its description that it has no effect. Nothing else is accepted.
Rule 2: handlers read plain attributes: lists, tuples, dicts, numbers and strings that are already checked.
"""

from mlxserver.api.native.load import LoadRequest, UnloadRequest, derive_key
from mlxserver.api.openai.chat import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    ChatPromptRequest,
    PromptRequest,
    ReasoningFormat,
    TokenizeRequest,
)
from mlxserver.api.openai.completions import CompletionRequest, DetokenizeRequest
from mlxserver.api.openai.generation import GeneratingRequest
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Request, ValidationFailed, json_schema, parse

__all__ = [
    "ApplyTemplateRequest",
    "ChatCompletionRequest",
    "ChatPromptRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GeneratingRequest",
    "Limits",
    "LoadRequest",
    "PromptRequest",
    "ReasoningFormat",
    "Request",
    "TokenizeRequest",
    "UnloadRequest",
    "ValidationFailed",
    "derive_key",
    "json_schema",
    "parse",
]
