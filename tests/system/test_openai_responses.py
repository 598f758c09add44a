"""Responses over real sockets, with OpenAI's own client as the oracle of every answer and event."""

import asyncio
import json

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent

from tests.support.published import check
from tools.harness.models import scripted_model
from tools.harness.running_server import running_server

USER, OTHER = "sk-user-0123456789", "sk-other-0123456789"
EVENT, ITEM = pydantic.TypeAdapter(ResponseStreamEvent), pydantic.TypeAdapter(ResponseItem)
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
OSLO, ROME = (CALL % ("get_weather", json.dumps({"city": city})) for city in ("Oslo", "Rome"))
PATCH = "*** Begin\n+ \"caf\u00e9\" \\ \U0001f600\n*** End"
SCRIPTS = {
    "hello": "Hello there, and hello there again.",
    "think": "<think>\nTwo and two are four.\n</think>\n\nIt is four.",
    "weather": f"<think>\nI look.\n</think>\n\nOne moment.\n{OSLO}",
    "two": f"{OSLO}\n{ROME}",
    "patch": CALL % ("apply_patch", json.dumps({"input": PATCH})),
    "space": CALL % ("mcp__files__read", '{"path": "a"}'),
    "sunny": "It is sunny in Oslo.",
    "json": '{"city": "Oslo", "degrees": 3}',
}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: str
    degrees: int


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("responses")
    path = scripted_model(directory / "m", SCRIPTS, tokens=("<think>", "</think>"), context=2048, history="xml")
    sections = [f"[models.{key}]\nsource = {json.dumps(str(path))}" for key in ("m", "n")]
    config = directory / "models.toml"
    config.write_text("\n".join(["heartbeat_interval = 0.05", *sections]))
    keys = ("--api-key", USER, "--api-key", OTHER)
    with running_server("--no-defaults", "--config", str(config), *keys, "--log-level", "warning") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0) as client:
        yield client


def created(client, input, **fields):
    """A whole response, which is of the SDK's types and of the published schema."""
    raw = client.responses.with_raw_response.create(model="m", input=input, **fields)
    content = json.loads(raw.text)
    check(content, "Response")
    Response.model_validate_json(raw.text, strict=True)
    return raw.parse()


def streamed(client, input, **fields):
    """The events of a stream, each of the SDK's types and of the published schema, numbered without a gap."""
    with client.responses.with_streaming_response.create(model="m", input=input, stream=True, **fields) as raw:
        blocks = raw.read().decode().split("\n\n")
    events = []
    for block in filter(None, blocks):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        check(content, "ResponseEvent")
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events):
    """The types of the events in order, runs of one type and heartbeats once."""
    found = [event["type"].removeprefix("response.") for event in events]
    return [kind for n, kind in enumerate(found) if n < 2 or kind not in ("in_progress", found[n - 1])]
