"""Images as the official clients send them, up to the engine; and their refusals, in the shape of each API."""

import asyncio
import base64
import json
from contextlib import asynccontextmanager

import anthropic
import ollama
import openai
import pytest
import uvicorn

from mlxserver.engine import images
from mlxserver.engine.conversation import Image, Text, ToolResult
from mlxserver.server.app import App
from mlxserver.server.auth import Auth
from mlxserver.server.image_urls import ImageUrls
from mlxserver.server.request_history import RequestHistory
from tests.support.image_site import open_to_the_test, site
from tests.support.images import RED, file_of, half
from tests.support.managed import managed, specs
from tests.support.scripted_engine import until, within_deadline

PICTURE = file_of(half(RED, RED), "WEBP", lossless=True)
BASE64 = base64.b64encode(PICTURE).decode()
URL = f"data:image/png;base64,{BASE64}"
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@asynccontextmanager
async def served(urls=None, kind="vision", **settings):
    """A server over a scripted engine, which takes any image: its URL, and the messages that come to the engine."""
    async with managed(specs("m", kind=kind), host="127.0.0.1", **settings) as (manager, factory):
        app = Auth(App(manager, reload=None, history=RequestHistory(), images=urls or ImageUrls()), manager)
        config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]

        def messages():
            asked = factory.runners[-1].asked
            return [message for one in asked for message in one.prompt.conversation]

        try:
            yield f"http://127.0.0.1:{port}", messages
        finally:
            server.should_exit = True
            await serving


def openai_client(url):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def anthropic_client(url):
    return anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0)


@within_deadline
async def test_openais_client_sends_images_of_chats():
    async with served() as (url, messages), openai_client(url) as client:
        content = [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            {"type": "text", "text": "b"},
        ]
        await client.chat.completions.create(
            model="m",
            max_tokens=2,
            messages=[
                {"role": "user", "content": content},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": [content[1]]},
            ],
        )
        first, _, result = messages()
        place = "messages[0].content[1].image_url"
        assert first.parts == (Text("a"), Image(PICTURE, place, detail="low"), Text("b"))
        assert result.result.images == (Image(PICTURE, "messages[2].content[0].image_url", detail="low"),)
        assert images.decode(first.images[0]).getpixel((0, 0)) == RED


@within_deadline
async def test_openais_client_sends_images_of_responses():
    async with served() as (url, messages), openai_client(url) as client:
        image = {"type": "input_image", "image_url": URL, "detail": "auto"}
        response = await client.responses.create(
            model="m",
            max_output_tokens=2,
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, image]},
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [image]},
            ],
        )
        first, _, result = messages()
        assert first.parts == (Text("a"), Image(PICTURE, "input[0].content[1].image_url"))
        assert result.parts == (ToolResult("c", "", images=(Image(PICTURE, "input[2].output[0].image_url"),)),)
        items = await client.responses.input_items.list(response.id, order="asc")
        assert items.data[0].content[1].image_url == URL
        assert items.data[2].output[0].image_url == URL
        await client.responses.create(
            model="m", max_output_tokens=2, input="And?", previous_response_id=response.id, stream=False
        )
        assert [image.data for message in messages()[3:] for image in message.images] == [PICTURE] * 2


@within_deadline
async def test_anthropics_client_sends_images():
    async with served() as (url, messages), anthropic_client(url) as client:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/webp", "data": BASE64}}
        asked = [
            {"role": "user", "content": [image, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "seen"}, image]}
                ],
            },
        ]
        await client.messages.create(model="m", max_tokens=2, messages=asked)
        first, _, result = messages()
        assert first.parts == (Image(PICTURE, "messages[0].content[0]"), Text("a"))
        place = "messages[2].content[0].content[1]"
        assert result.parts == (ToolResult("c", "seen", images=(Image(PICTURE, place),)),)


@pytest.mark.parametrize("as_path", [False, True])
@within_deadline
async def test_ollamas_client_sends_images(as_path, tmp_path):
    file = tmp_path / "a.webp"
    file.write_bytes(PICTURE)
    image = file if as_path else PICTURE
    async with served() as (url, messages):
        client = ollama.AsyncClient(url)
        options = {"num_predict": 2}
        asked = [{"role": "user", "content": "a", "images": [image]}, {"role": "assistant", "content": "b"}]
        await client.chat("m", [*asked, {"role": "user", "content": "c"}], options=options)
        assert messages()[0].parts == (Image(PICTURE, "messages[0].images[0]"), Text("a"))
        await client.generate("m", "Look", images=[image], options=options)
        assert messages()[-1].parts == (Image(PICTURE, "images[0]"), Text("Look"))
        await client._client.aclose()


@within_deadline
async def test_an_image_of_twenty_million_bytes_arrives():
    large = PICTURE + bytes(20_000_000)
    async with served() as (url, messages), openai_client(url) as client:
        data = base64.b64encode(large).decode()
        content = [{"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{data}"}}]
        await client.chat.completions.create(model="m", max_tokens=1, messages=[{"role": "user", "content": content}])
        assert len(messages()[0].images[0].data) == len(large)


@within_deadline
async def test_a_refusal_has_its_place_in_the_shape_of_each_api():
    """A URL that is not fetched, in each dialect that takes URLs: 400 before the model is loaded."""
    link = "http://127.0.0.1:9/a.png"
    async with served(allow_image_urls=True) as (url, _):
        async with openai_client(url) as client:
            content = [{"type": "image_url", "image_url": {"url": link}}]
            for streams in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": content}], stream=streams
                    )
                assert caught.value.param == "messages[0].content[0].image_url"
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(
                    model="m",
                    input=[{"role": "user", "content": [{"type": "input_image", "image_url": link, "detail": "auto"}]}],
                )
            assert caught.value.param == "input[0].content[0].image_url"
        async with anthropic_client(url) as client:
            block = {"type": "image", "source": {"type": "url", "url": link}}
            asked = [{"role": "user", "content": [block]}]
            for call in (client.messages.create(model="m", max_tokens=2, messages=asked),
                         client.messages.count_tokens(model="m", messages=asked)):  # fmt: skip
                with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]"):
                    await call


@within_deadline
async def test_a_url_that_is_allowed_is_fetched_before_the_engine_gets_it():
    urls = open_to_the_test()
    async with site() as web, served(urls, allow_image_urls=True) as (url, messages), openai_client(url) as client:
        content = [{"type": "image_url", "image_url": {"url": f"{web.url}/image"}}]
        asked = [{"role": "user", "content": content}]
        stream = await client.chat.completions.create(model="m", max_tokens=2, messages=asked, stream=True)
        assert [chunk async for chunk in stream]
        assert images.decode(messages()[0].images[0]).size == (32, 16)


@within_deadline
async def test_nothing_is_fetched_for_a_model_that_sees_no_images():
    urls = open_to_the_test()
    for kind, reason in (("text", "sees no images"), ("embedding", "embedding model")):
        async with (
            site() as web,
            served(urls, kind, allow_image_urls=True) as (url, _),
            openai_client(url) as client,
            anthropic_client(url) as other,
        ):
            content = [{"type": "image_url", "image_url": {"url": f"{web.url}/image"}}]
            for streams in (False, True):
                with pytest.raises(openai.BadRequestError, match=reason):
                    await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": content}], stream=streams
                    )
            block = {"type": "image", "source": {"type": "url", "url": f"{web.url}/image"}}
            await other.messages.count_tokens(model="m", messages=[{"role": "user", "content": [block]}])
            assert not web.requests


@within_deadline
async def test_a_slow_image_keeps_its_stream_alive_and_fails_in_it():
    """Headers are out by then, so that the failure is an event of the stream."""
    urls = open_to_the_test()
    settings = {"allow_image_urls": True, "image_url_timeout": 0.5, "heartbeat_interval": 0.02}
    async with site() as web, served(urls, **settings) as (url, _), openai_client(url) as client:
        content = [{"type": "image_url", "image_url": {"url": f"{web.url}/slow"}}]
        asked = [{"role": "user", "content": content}]
        lines = []
        async with client.chat.completions.with_streaming_response.create(
            model="m", messages=asked, stream=True
        ) as response:
            lines = [line async for line in response.iter_lines()]
        assert any(line.startswith(":") for line in lines)
        failure = next(json.loads(line[6:]) for line in lines if line.startswith("data: {"))
        assert failure["error"]["param"] == "messages[0].content[0].image_url"
