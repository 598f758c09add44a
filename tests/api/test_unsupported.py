"""What docs/api.md lists as not supported: each entry is sent, and refused by its name."""

import re
import typing
from pathlib import Path

import ollama._types
import orjson
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params

from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.schema.parameters import ValidationFailed, json_schema, parse
from mlxserver.config.settings import Settings

PAGE = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text()
BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}
HELLO = [{"role": "user", "content": "hello"}]
GOOD = {
    "chat_completions": {"messages": HELLO},
    "responses": {"input": "hello"},
    "messages": {"messages": HELLO},
    "ollama_chat": {"messages": HELLO},
    "ollama_generate": {"prompt": "hello"},
}
SEARCH = {"type": "web_search_20260318", "name": "web_search"}


def parts(*content):
    """A user's message of these parts."""
    return [{"role": "user", "content": list(content)}]


# By a word of the table's first column: the endpoint, what is sent, and the field that the refusal names.
RESPONSES = {
    "background": [({"background": True}, "background")],
    "conversation": [({"conversation": "c"}, "conversation")],
    "prompt": [({"prompt": {"id": "p"}}, "prompt")],
    "moderation": [({"moderation": {"model": "x"}}, "moderation")],
    "input_file": [
        ({"input": parts({"type": "input_file", "file_id": "f"})}, "input[0].content[0].type"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
            "input[0].output[0].type",
        ),
    ],
    "file_id": [({"input": parts({"type": "input_image", "file_id": "f"})}, "input[0].content[0].file_id")],
    "input_audio": [({"input": parts({"type": "input_audio", "input_audio": {}})}, "input[0].content[0].type")],
    "tool_choice": [
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{"type": "mcp"}], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
    ],
}
MESSAGES = {
    "document": [
        (
            {"messages": parts({"type": "document", "source": {"type": kind, **source}})},
            "messages[0].content[0]",
        )
        for kind, source in (
            ("base64", {"media_type": "application/pdf", "data": "AAAA"}),
            ("url", {"url": "http://localhost/x.pdf"}),
            ("file", {"file_id": "f"}),
        )
    ],
    "source": [
        (
            {"messages": parts({"type": "image", "source": {"type": "file", "file_id": "f"}})},
            "messages[0].content[0].source.file_id",
        ),
        ({"system": [{"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}]}, "system[0]"),
    ],
    "any other block in a user's message": [
        ({"messages": parts({"type": "container_upload", "file_id": "f"})}, "messages[0].content[0].type")
    ],
    "tool_choice": [
        ({"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, "tool_choice.name"),
    ],
    "mcp_servers": [({"mcp_servers": [{"type": "url", "url": "http://localhost", "name": "x"}]}, "mcp_servers")],
    "container": [({"container": "c"}, "container")],
    "thread": [({"thread": {"id": "t"}}, "thread")],
    "compaction": [({"compaction": {"type": "auto"}}, "compaction")],
}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
OLLAMA = {
    "raw": [({"images": [PNG], "raw": True}, "images")],
    "suffix": [({"images": [PNG], "suffix": "y"}, "images")],
    "template": [({"template": "{{ .Prompt }}"}, "template")],
    "context": [({"context": [1, 2]}, "context")],
    "width": [({"width": 64}, "width")],
    "height": [({"height": 64}, "height")],
    "steps": [({"steps": 4}, "steps")],
}
CHATS = {
    "audio": [({"audio": {"voice": "x", "format": "wav"}}, "audio")],
    "function_call": [({"function_call": "auto"}, "function_call")],
    "functions": [({"functions": [{"name": "f"}]}, "functions")],
    "moderation": [({"moderation": {"model": "x"}}, "moderation")],
    "web_search_options": [({"web_search_options": {}}, "web_search_options")],
}
DIALECTS = {
    "responses": ("## Responses", "**Not supported**", RESPONSES),
    "messages": ("## Anthropic's messages", "Not supported, and refused", MESSAGES),
    "ollama_generate": ("## Ollama's API", "### What is not supported", OLLAMA),
}
SENT = [
    (endpoint, body, param)
    for endpoint, cases in (*((name, each) for name, (_, _, each) in DIALECTS.items()), ("chat_completions", CHATS))
    for sent in cases.values()
    for body, param in sent
]
# Tried over HTTP: in test_ollama.py, in test_openai_responses.py, and with images.
ELSEWHERE = {
    "item_reference", "GET", "file", "truncate", "shift", "images", "image", "input_image", "/api/create", "/api/push",
    "/api/blobs", "/api/delete", "/api/chat", "/api/generate",
}  # fmt: skip


def refused(endpoint, body):
    with pytest.raises(ValidationFailed) as caught:
        BY_NAME[endpoint].dialect(Settings()).parse(orjson.dumps({"model": "m", **GOOD[endpoint], **body}))
    return caught.value


def entries(heading, start):
    """The first column of the table behind a start, in the section of a heading."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition(start)[2]
    table = section.partition("| --- | --- |\n")[2].partition("\n\n")[0]
    return [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()]


@pytest.mark.parametrize(("endpoint", "body", "param"), SENT, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_its_name(endpoint, body, param):
    error = refused(endpoint, body)
    assert error.param == param
    assert param.removesuffix(".type") in error.message


@pytest.mark.parametrize(("heading", "start", "cases"), DIALECTS.values(), ids=DIALECTS)
def test_each_entry_of_the_tables_is_tried(heading, start, cases):
    found = entries(heading, start)
    assert found
    for entry in found:
        words = {re.split(r"[ :?]", word)[0] for word in re.findall(r"`([^`]+)`", entry)} or {entry}
        assert words <= cases.keys() | ELSEWHERE, entry


@pytest.mark.parametrize(
    ("params", "endpoint"),
    [
        (message_create_params.MessageCreateParamsBase, "messages"),
        (beta_message_create_params.MessageCreateParamsBase, "messages"),
        (message_count_tokens_params.MessageCountTokensParams, "count_tokens"),
        (ollama._types.ChatRequest, "ollama_chat"),
        (ollama._types.GenerateRequest, "ollama_generate"),
        (ollama._types.EmbedRequest, "ollama_embed"),
        (ollama._types.EmbeddingsRequest, "ollama_embeddings"),
        (ollama._types.PullRequest, "ollama_pull"),
    ],
)
def test_every_field_that_the_sdks_send_is_declared_and_documented(params, endpoint):
    if hasattr(params, "model_fields"):
        fields = {field.alias or name for name, field in params.model_fields.items()}
    else:
        fields = typing.get_type_hints(params).keys()
    assert fields <= json_schema(BY_NAME[endpoint].request)["properties"].keys()
    assert [name for name in fields if f"`{name}`" not in PAGE] == []


def test_every_option_of_the_sdk_is_taken_and_documented():
    options = {field.alias or name: field for name, field in ollama._types.Options.model_fields.items()}
    assert [name for name in options if f"`{name}`" not in PAGE] == []
    values = {"stop": ["x"], "temperature": 0.5, "top_p": 0.5, "seed": 1, "top_k": 1}
    body = {"model": "m", "prompt": "x", "options": {name: values.get(name) for name in options}}
    assert parse(BY_NAME["ollama_generate"].request, orjson.dumps(body)).model == "m"
