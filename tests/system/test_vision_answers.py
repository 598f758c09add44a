"""Answers of a real vision model over real sockets: those of mlx-vlm, alone and in company, and what is cached."""

import base64
import json
import threading

import openai
import pytest
import requests

from tests.support.vision_models import Reference, attached, question
from tools.harness.running_server import running_server
from tools.harness.vision_models import picture, tiny_vision

TEXT, TOKENS = "What is the capital of France?", 8
PICTURE = picture(1)
BASE64 = base64.b64encode(attached(PICTURE).data).decode()
IMAGE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}
CONTENT = [IMAGE_URL, {"type": "text", "text": TEXT}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_vision(tmp_path_factory.mktemp("vision") / "m", "qwen2_5_vl")


@pytest.fixture(scope="module")
def server(path):
    with running_server("--no-defaults", "--model", f"m={path}", "--log-level", "warning") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(path, client):
    """What mlx-vlm says of the picture."""
    reference = Reference(path)
    tokens, _ = reference.answer(question(TEXT, PICTURE))
    return reference.text(tokens)


def chat(client, messages, **fields):
    fields = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}} | fields
    return client.chat.completions.create(model="m", messages=messages, **fields)


def test_the_list_of_models_says_what_it_sees(server, client):
    chat(client, [{"role": "user", "content": "Hello"}])
    (model,) = requests.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    assert model["kind"] == "vision"
    assert "vision" in model["capabilities"]


def test_a_picture_is_answered_as_mlx_vlm_does_whole_and_streamed(client, expected):
    whole = chat(client, [{"role": "user", "content": CONTENT}])
    assert whole.choices[0].message.content == expected
    streamed = chat(client, [{"role": "user", "content": CONTENT}], stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed if part.choices) == expected


def test_the_picture_is_cached_with_its_prompt_and_the_next_turn_goes_on_from_it(client, expected):
    first = {"role": "user", "content": CONTENT}
    chat(client, [first])
    again = chat(client, [first]).usage
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1
    turns = [first, {"role": "assistant", "content": expected}, {"role": "user", "content": "And then?"}]
    assert chat(client, turns).usage.prompt_tokens_details.cached_tokens >= again.prompt_tokens - 4


def test_texts_and_pictures_decode_together(client, expected):
    alone = chat(client, [{"role": "user", "content": "Hello"}], max_tokens=60).choices[0].message.content
    answers = {}

    def ask(number):
        content, most = ("Hello", 60) if number % 2 else (CONTENT, TOKENS)
        answers[number] = chat(client, [{"role": "user", "content": content}], max_tokens=most)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [answers[number].choices[0].message.content for number in range(8)]
    assert texts == [expected, alone] * 4


def test_a_schema_log_probabilities_and_a_seed_hold_for_a_picture(client):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    messages = [{"role": "user", "content": CONTENT}]
    answer = chat(client, messages, response_format=format, max_tokens=100, extra_body={}, logprobs=True)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")
    assert answer.choices[0].logprobs.content
    seeded = [chat(client, messages, temperature=1, seed=3).choices[0].message.content for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_a_tool_is_called_for_a_picture_and_its_result_may_be_one(client):
    parameters = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "paint", "parameters": parameters, "strict": True}}]
    messages = [{"role": "user", "content": CONTENT}]
    fields = {"tools": tools, "tool_choice": "required", "max_tokens": 200, "extra_body": {}}
    whole = chat(client, messages, **fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    parts = [part.choices[0].delta for part in chat(client, messages, stream=True, **fields) if part.choices]
    streamed = [call.function.arguments or "" for part in parts for call in part.tool_calls or ()]
    assert "".join(streamed) == call.function.arguments
    messages += [whole.message, {"role": "tool", "tool_call_id": call.id, "content": [IMAGE_URL]}]
    with_result, without = (chat(client, messages[:length], tools=tools) for length in (3, 1))
    assert with_result.usage.prompt_tokens > without.usage.prompt_tokens + 4
    assert with_result.choices[0].message.content
