"""Tool formats: how models write their tool calls.

Rule 1: a model whose template has tools keeps its own format, with mlx-lm's parser of that family.
Rule 2: the prompt of every other model describes the plain format (prompt/tool_text.py).
Rule 3: a forced call is a bare JSON array, which a grammar enforces whatever the model's own format is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlxserver.engine.mlx  # noqa: F401  (prepares the process before mlx_lm imports MLX)

from mlx_lm.tool_parsers import json_tools

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.json_calls import sendable

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A whole call. arguments: JSON text of an object. id: the model's own, where its format has one."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Tags around tool calls, and the parser of the text between them.

    start "": all of the content is calls. end "": they go on to the end of the answer. is_native: the model's own
    format. is_json: each call is one JSON object of a name and arguments.
    """

    start: str
    end: str
    parser: Callable[[str, Any], Any]
    is_native: bool = False
    is_json: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        """All texts that begin a call; empty where all content is calls."""
        return (self.start,) if self.start else ()

    def parse(self, body: str, tools: Iterable[Tool]) -> list[ParsedCall]:
        """The calls between two tags, at least one. Raises ValueError."""
        try:
            found = self.parser(body.strip(), [_for_parser(tool) for tool in tools])
            calls = [_check(call) for call in (found if isinstance(found, list) else [found])]
        except Exception as error:  # mlx-lm's parsers let any error through
            raise ValueError(f"{body!r} is no tool call: {error}") from error
        if not calls:
            raise ValueError(f"{body!r} has no tool call")
        return calls


def _for_parser(tool: Tool) -> dict[str, Any]:
    """A tool in which a parser finds the parameters that a function without any may leave out."""
    return {"type": "function", "function": {"parameters": {}, **tool.function}}


def _check(call: Any) -> ParsedCall:
    name, arguments, own_id = call["name"], call.get("arguments", {}), call.get("id")
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f"{call!r}: expected a name and an object of arguments")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ParsedCall(sendable(name), sendable(text), sendable(own_id) if isinstance(own_id, str) and own_id else None)


def _parse_json(body: str, _tools: Any) -> Any:
    return json.loads(body)


PLAIN = ToolFormat("<tool_call>", "</tool_call>", _parse_json, is_json=True)
FORCED = ToolFormat("", "", _parse_json)


def native_format(tokenizer: TokenizerWrapper) -> ToolFormat:
    """The format of a tokenizer that has tool calling."""
    parser = tokenizer.tool_parser
    return ToolFormat(
        tokenizer.tool_call_start,
        tokenizer.tool_call_end or "",
        parser,
        is_native=True,
        is_json=parser is json_tools.parse_tool_call,
    )
