"""Fuzz targets: the parsers of foreign bytes, each as a function of any bytes, with seed inputs.

Rule 1: any bytes give a documented result or the one documented error.
Rule 2: any cut of a stream gives the same result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import mlxserver.engine.mlx  # noqa: F401  (prepares the process before mlx_lm imports MLX)

import orjson
from mlx_lm import tool_parsers

from mlxserver.api.endpoints import ENDPOINTS, encode_failure
from mlxserver.api.native.load import LoadRequest
from mlxserver.api.ollama.pull import OllamaPullRequest
from mlxserver.api.openai.chat import ChatDialect
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.client import transcript
from mlxserver.client.errors import ClientError
from mlxserver.client.stream import StreamReader
from mlxserver.config import load
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.settings import Settings
from mlxserver.engine.conversation import Tool
from mlxserver.engine.events import Delta, ToolCallDelta
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.output.call_families import FAMILIES
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import FORMATS as REASONING_FORMATS
from mlxserver.engine.output.splitter import Splitter
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.output.tool_calls import ToolCallParser
from mlxserver.engine.output.tool_formats import FORCED, PLAIN, ToolFormat, parsed_format
from mlxserver.server.errors import failure_of
from tools.hostile_bodies import TAKING, good_body

BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}
READING = [endpoint.name for endpoint in ENDPOINTS if endpoint.request]
TOOLS = [Tool("add", parameters={"properties": {"a": {"type": "number"}}})]
PARSERS = [import_module(f"mlx_lm.tool_parsers.{module.name}") for module in iter_modules(tool_parsers.__path__)]
FORMATS = (
    PLAIN,
    FORCED,
    *(family.format for family in FAMILIES),
    *(parsed_format("<tool_call>", "</tool_call>", module.parse_tool_call) for module in PARSERS),
    parsed_format("[TOOL_CALLS]", "", tool_parsers.json_tools.parse_tool_call),
)
GLM, QWEN = (bytes([[tool_format.name for tool_format in FORMATS].index(name)]) for name in ("glm", "qwen3_coder"))
CHAT = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'


def _reads(name: str) -> bytes:
    """The first byte of an input that an endpoint is to read."""
    return bytes([READING.index(name)])


def requests(data: bytes) -> None:
    """Bodies of requests: a call or a request, or ValidationFailed."""
    if not data:
        return
    endpoint = BY_NAME[READING[data[0] % len(READING)]]
    settings = Settings(unknown_parameters="ignore" if data[0] & 128 else "refuse")
    try:
        if endpoint.dialect:
            call = endpoint.dialect(settings).parse(data[1:])
            if call.for_client:
                call.for_client(call, "")
        elif endpoint.request:
            asked = parse(endpoint.request, data[1:], Limits.of(settings))
            if isinstance(asked, LoadRequest):
                sources.check(asked.model)
                asked.spec  # noqa: B018  (derives a key)
            if isinstance(asked, OllamaPullRequest):
                sources.check(asked.source)
                asked.spec  # noqa: B018  (derives a key)
    except (ValidationFailed, SourceInvalid) as error:
        encode_failure(endpoint.path, failure_of(error)[1])


def calls(data: bytes) -> None:
    """Tool calls in a model's text: events that can be encoded, and no cut of the text changes them."""
    if len(data) < 2:
        return
    tool_format, text = FORMATS[data[0] % len(FORMATS)], data[2:].decode(errors="replace")
    whole = _calls(tool_format, [text], is_cut=bool(data[0] & 128))
    assert whole == _calls(tool_format, _pieces(text, data[1]), is_cut=bool(data[0] & 128)), text
    encoder = ChatDialect(Settings()).parse(CHAT).encoder
    for number, (id_and_name, arguments) in enumerate(whole[1]):
        encoder.event(ToolCallDelta(number, arguments, "call", id_and_name[1]), 0)
    encoder.event(Delta(whole[0]), 0)


def _calls(tool_format: ToolFormat, pieces: Iterable[str], *, is_cut: bool) -> tuple[str, list[tuple[Any, str]]]:
    """The content, and each call as ((number, name), arguments)."""
    parser = ToolCallParser(tool_format, TOOLS)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.flush(is_cut=is_cut)
    content = ""
    found: dict[int, tuple[Any, str]] = {}
    for event in events:
        if isinstance(event, TokenText):
            content += event.text
        else:
            key, arguments = found.get(event.call, ((event.call, event.name), ""))
            found[event.call] = (key, arguments + event.arguments)
    return content, list(found.values())


def thinking(data: bytes) -> None:
    """Reasoning and content, and calls in channels: no cut of the text changes them."""
    if len(data) < 2:
        return
    text = data[2:].decode(errors="replace")
    outcomes = [_channels(_splitter(data[0]), pieces) for pieces in ([text], _pieces(text, data[1]))]
    assert outcomes[0] == outcomes[1], text


def _splitter(kind: int) -> Splitter:
    marks, is_inside = REASONING_FORMATS[(kind >> 3) % len(REASONING_FORMATS)], bool(kind & 1)
    if marks.channels:
        return ChannelParser(marks.channels, is_inside, tools=[tool.name for tool in TOOLS if kind & 4])
    starts = ("<tool_call>",) if kind & 4 else ()
    return ThinkingParser(marks, is_inside, may_close_twice=bool(kind & 2), call_starts=starts)


def _channels(parser: Splitter, pieces: Iterable[str]) -> dict[str, str]:
    texts = {"reasoning": "", "content": "", "calls": ""}
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.flush():
        if isinstance(part, ToolCallDelta):
            texts["calls"] += f"{part.name or ''}{part.arguments}"
        else:
            texts[part[0]] += part[1].text
    return texts


def settings(data: bytes) -> None:
    """A settings file, or an environment variable: settings, or ConfigInvalid."""
    try:
        if data[:1] < b"\x80":
            with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
                file.write(data)
                file.flush()
                load.read_file(Path(file.name))
        else:
            name = [*load.ENVIRONMENT][data[0] % len(load.ENVIRONMENT)]
            load.read_environment({name: data[1:].decode(errors="replace")})
    except ConfigInvalid as error:
        str(error)


def events(data: bytes) -> None:
    """A stream as the client reads it: events, or ClientError; no cut of the bytes changes them."""
    if not data:
        return
    assert _events([data[1:]]) == _events(_pieces(data[1:], data[0])), data


def _events(pieces: Iterable[bytes]) -> list[object]:
    found: list[object] = []
    reader = StreamReader(lambda step: None)  # progress is left out: it is reported even behind the end of a stream
    try:
        for piece in pieces:
            found += reader.feed(piece, 0.0)
        found += reader.end(0.0)
    except ClientError as error:
        found.append(str(error))
    return found


def conversations(data: bytes) -> None:
    """Files that the shell opens: a conversation, or ValueError."""
    text = data.decode(errors="replace")
    for read, write in (
        (transcript.parse_json, transcript.format_json),
        (transcript.parse_markdown, transcript.format_markdown),
    ):
        try:
            conversation = read(text)
        except ValueError:
            continue
        assert read(write(conversation)) == conversation, text


TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "requests": (
        requests,
        (
            _reads("chat_completions")
            + b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"n":2,"stop":["a"]}',
            _reads("chat_completions")
            + b'{"model":"m","messages":[{"role":"assistant","tool_calls":[{"id":"i","type":"function","function":'
            b'{"name":"f","arguments":"{}"}}]}],"tools":[{"type":"function","function":{"name":"f"}}],'
            b'"tool_choice":"auto","response_format":{"type":"json_object"},"logit_bias":{"1":2}}',
            _reads("completions") + b'{"model":"m","prompt":[[1,2],[3]],"echo":true,"logprobs":1,"max_tokens":5}',
            _reads("load_model") + b'{"model":"org/m","key":"k","defaults":{"top_p":0.5},"ttl":"5m","replace":true}',
            _reads("unload_model") + b'{"key":"k","mode":"drain","timeout":1.5}',
            *(_reads(endpoint.name) + orjson.dumps(good_body(endpoint)) for endpoint in TAKING),
            _reads("responses")
            + b'{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"x"}]},{"type":'
            b'"function_call","name":"f","call_id":"c","arguments":"{}"},{"type":"function_call_output","call_id":"c",'
            b'"output":"y"},{"type":"reasoning","summary":[{"type":"summary_text","text":"z"}]}],"tools":[{"type":'
            b'"custom","name":"f"}],"tool_choice":{"type":"custom","name":"f"},"text":{"format":{"type":"text"}}}',
            _reads("messages")
            + b'{"model":"m","system":[{"type":"text","text":"s"}],"messages":[{"role":"user","content":[{"type":'
            b'"tool_result","tool_use_id":"i","content":[{"type":"text","text":"x"}],"is_error":true}]},{"role":'
            b'"assistant","content":[{"type":"tool_use","id":"i","name":"f","input":{}}]}],"tools":[{"name":"f",'
            b'"input_schema":{}}],"tool_choice":{"type":"any"},"thinking":{"type":"enabled","budget_tokens":-1},'
            b'"output_config":{"effort":"low","format":{"type":"json_schema","schema":{}}},"stop_sequences":["a"]}',
        ),
    ),
    "calls": (
        calls,
        (
            b'\x00\x03text <tool_call>{"name": "add", "arguments": {"a": "}\\""}}</tool_call> more',
            b'\x01\x01[{"arguments": "{\\"a\\": 1}", "name": "add"}, {"name": "b"}]',
            b'\x00\x05<tool_call>{"name": "\\ud800", "arguments": "{\\"a\\": \\"\\udc00\\"}"}</tool_call>',
            GLM + b"\x02<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
            QWEN + b"\x02<tool_call><function=add><parameter=a>1</parameter></function></tool_call>",
        ),
    ),
    "thinking": (thinking, (b"\x00\x02 <think> a </think> b", b"\x03\x01a</think></think> b")),
    "settings": (
        settings,
        (b'port = 1\napi_key = ["12345678"]\n[models.m]\nsource = "a/b"\naliases = ["c"]\nttl = 5\n', b"\x8112GB"),
    ),
    "events": (
        events,
        (
            b'\x05data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\r\n\r\ndata: [DONE]\n\n',
            b'\x02: loading {"stage":"reading","done":1,"total":2}\n\ndata: {"error":{"message":"m"}}\n\n',
        ),
    ),
    "conversations": (
        conversations,
        (
            b'[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]',
            b"## user\n\na\n\n## assistant\n\nb\n\n",
        ),
    ),
}


def _pieces(text: Any, step: int) -> Iterator[Any]:
    """A cut of a text or of bytes, chosen by `step`."""
    start = 0
    while start < len(text):
        length = 1 + (step * (start + 3)) % 7
        yield text[start : start + length]
        start += length
