"""The requests that the server takes, each parameter declared once.

Rule 1: what is declared is honoured, or says in its description that it has no effect. Nothing else is accepted.
Rule 2: handlers read plain attributes: lists, tuples, dicts, numbers and strings that are already checked.
"""

from protocol.chat import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    ChatPromptRequest,
    PromptRequest,
    ReasoningFormat,
    TokenizeRequest,
)
from protocol.completions import CompletionRequest, DetokenizeRequest
from protocol.generation import GeneratingRequest
from protocol.limits import Limits
from protocol.management import LoadRequest, UnloadRequest, derive_key
from protocol.parameters import Request, ValidationFailed, json_schema, parse

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
