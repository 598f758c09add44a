"""A vision model over real sockets: official clients of each dialect, hostile images, a text model beside it."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import anthropic
import ollama
import openai
import pytest
from PIL import Image

from mlxserver.engine.platform import device
from tests.support.images import BLUE, RED, file_of, half, hostile_images, png_bomb
from tests.support.servers import clean_server
from tools.harness.vision_models import tiny_vision

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="tiny random models answer alike only in float32")

PICTURE = half(RED, BLUE, size=(48, 32))
FILE, OTHER = file_of(PICTURE), file_of(half(BLUE, RED, size=(48, 32)))
WORDS, LIMIT = "What is it?", 12


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path):
    """A tiny vision model of random weights, and a text model."""
    folder = tmp_path_factory.mktemp("vision")
    path = tiny_vision(folder / "model", "qwen2_5_vl")
    config = folder / "models.toml"
    config.write_text(
        f'[models.eyes]\nsource = "{path}"\ntype = "instruction"\npreload = true\n'
        f"[models.eyes.defaults]\ntemperature = 0.0\n"
        f'[models.talker]\nsource = "{scripted_path}"\ntype = "instruction"\npreload = true\n'
    )
    with clean_server("--no-defaults", "--config", str(config)) as server:
        yield server


def url_of(file):
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def chat(server, file, model="eyes", detail="auto"):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        content = [
            {"type": "image_url", "image_url": {"url": url_of(file), "detail": detail}},
            {"type": "text", "text": WORDS},
        ]
        answer = client.chat.completions.create(
            model=model, max_tokens=LIMIT, messages=[{"role": "user", "content": content}]
        )
        return answer.usage.prompt_tokens, answer.choices[0].message.content


def respond(server, file, model="eyes"):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        image = {"type": "input_image", "image_url": url_of(file), "detail": "auto"}
        content = [image, {"type": "input_text", "text": WORDS}]
        answer = client.responses.create(
            model=model, max_output_tokens=LIMIT, input=[{"role": "user", "content": content}]
        )
        return answer.usage.input_tokens, answer.output_text


def message(server, file, model="eyes"):
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(file).decode()}
        content = [{"type": "image", "source": source}, {"type": "text", "text": WORDS}]
        asked = [{"role": "user", "content": content}]
        answer = client.messages.create(model=model, max_tokens=LIMIT, messages=asked)
        assert client.messages.count_tokens(model=model, messages=asked).input_tokens == sum(
            (answer.usage.input_tokens, answer.usage.cache_read_input_tokens or 0)
        )
        return answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0), answer.content[0].text


@contextmanager
def ollama_client(server):
    client = ollama.Client(server.url)
    try:
        yield client
    finally:
        client._client.close()


def ollama_chat(server, file, model="eyes"):
    asked = [{"role": "user", "content": WORDS, "images": [file]}]
    with ollama_client(server) as client:
        answer = client.chat(model, asked, options={"num_predict": LIMIT})
    return answer.prompt_eval_count, answer.message.content


def ollama_generate(server, file, model="eyes"):
    with ollama_client(server) as client:
        answer = client.generate(model, WORDS, images=[file], options={"num_predict": LIMIT})
    return answer.prompt_eval_count, answer.response


DIALECTS = (chat, respond, message, ollama_chat, ollama_generate)


def test_a_picture_is_seen_alike_through_every_official_client(server):
    seen = {ask.__name__: ask(server, FILE) for ask in DIALECTS}
    assert len(set(seen.values())) == 1, seen
    others = {ask(server, OTHER) for ask in DIALECTS}
    assert len(others) == 1
    assert others != set(seen.values())  # the model is not blind


@pytest.mark.parametrize("ask", DIALECTS)
def test_a_text_model_refuses_a_picture_in_every_dialect(server, ask):
    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError, ollama.ResponseError)) as caught:
        ask(server, FILE, model="talker")
    assert getattr(caught.value, "status_code", None) == 400
    assert "sees no images" in str(caught.value)


def test_a_rotated_picture_is_the_upright_one(server):
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = file_of(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert rotated != FILE
    assert chat(server, rotated) == chat(server, FILE)


def test_an_image_in_an_earlier_turn_and_in_a_result_is_seen(server):
    def answer(file):
        image = {"type": "image_url", "image_url": {"url": url_of(file)}}
        call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, image]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "seen"}, image]},
            {"role": "user", "content": "And?"},
        ]
        done = server.post("/v1/chat/completions", {"model": "eyes", "max_tokens": LIMIT, "messages": messages})
        assert done.status == 200, done.body
        return done.json["choices"][0]["message"]["content"], done.json["usage"]["prompt_tokens"]

    (first, tokens), (second, others) = answer(FILE), answer(OTHER)
    assert first != second
    assert tokens == others


def of_results(file):
    """By endpoint: its request that ends in a tool's result of a text and this image; what was read, and the answer."""
    url, data = url_of(file), base64.b64encode(file).decode()
    function = {"name": "look", "arguments": "{}"}
    calls = [{"id": "c", "type": "function", "function": function}]
    yield (
        "/v1/chat/completions",
        {
            "max_tokens": LIMIT,
            "messages": [
                {"role": "user", "content": WORDS},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {
                    "role": "tool",
                    "tool_call_id": "c",
                    "content": [{"type": "text", "text": "seen"}, {"type": "image_url", "image_url": {"url": url}}],
                },
            ],
        },
        lambda body: (body["usage"]["prompt_tokens"], body["choices"][0]["message"]["content"]),
    )
    output = [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": url}]
    yield (
        "/v1/responses",
        {
            "max_output_tokens": LIMIT,
            "input": [
                {"role": "user", "content": WORDS},
                {"type": "function_call", "call_id": "c", **function},
                {"type": "function_call_output", "call_id": "c", "output": output},
            ],
        },
        lambda body: (body["usage"]["input_tokens"], body["output"][-1]["content"][0]["text"]),
    )
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "text", "text": "seen"}, {"type": "image", "source": source}]
    yield (
        "/v1/messages",
        {
            "max_tokens": LIMIT,
            "messages": [
                {"role": "user", "content": WORDS},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": content}]},
            ],
        },
        lambda body: (
            body["usage"]["input_tokens"] + (body["usage"].get("cache_read_input_tokens") or 0),
            body["content"][0]["text"],
        ),
    )
    yield (
        "/api/chat",
        {
            "stream": False,
            "options": {"num_predict": LIMIT},
            "messages": [
                {"role": "user", "content": WORDS},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
                {"role": "tool", "tool_name": "look", "content": "seen", "images": [data]},
            ],
        },
        lambda body: (body["prompt_eval_count"], body["message"]["content"]),
    )


def test_an_image_in_a_tools_result_is_seen_alike_in_every_dialect(server):
    def answers(file):
        for path, asked, read in of_results(file):
            done = server.post(path, {"model": "eyes", **asked})
            assert done.status == 200, done.body
            yield read(done.json)

    seen, others = set(answers(FILE)), set(answers(file_of(half(size=(64, 64)))))
    assert (len(seen), len(others)) == (1, 1), (seen, others)
    (tokens, _), (more, _) = *seen, *others
    assert tokens < more  # those of the larger picture


def status(server, file):
    content = [{"type": "image_url", "image_url": {"url": url_of(file)}}, {"type": "text", "text": "x"}]
    asked = {"model": "eyes", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    answer = server.post("/v1/chat/completions", asked)
    if answer.status == 400:
        assert answer.error["param"] == "messages[0].content[0].image_url"
    return answer.status


def test_200_hostile_images_are_400_or_seen_and_the_server_lives_on(server):
    files = [*hostile_images(), b"<svg/>", b"", png_bomb(20_000, 20_000)]
    files += [file_of(half(size=size)) for size in ((1, 1), (1, 3), (3, 1), (1, 200), (2000, 10))]
    files += [file_of(half((0, 0, 0, 9), (9, 9, 9, 9), mode="CMYK"), "JPEG")]
    assert len(files) >= 180
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda file: status(server, file), files))
    assert set(statuses) == {200, 400}, sorted(set(statuses))
    assert statuses[-6:] == [200] * 6  # tiny, long and CMYK ones are seen
    assert json.loads(server.get("/health").body)
    assert chat(server, FILE)[1]
