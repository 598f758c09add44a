"""Images in the requests of every dialect: where they may stand, in which forms, and what is refused by its place."""

import base64
import json

import jsonschema
import pytest

from mlxserver.api.anthropic.generation import MessagesDialect, MessagesRequest
from mlxserver.api.ollama.generation import OllamaChatDialect, OllamaGenerateDialect
from mlxserver.api.ollama.requests import OllamaChatRequest, OllamaGenerateRequest
from mlxserver.api.openai.chat import ChatCompletionRequest, ChatDialect
from mlxserver.api.openai.responses.dialect import ResponsesDialect
from mlxserver.api.openai.responses.request import ResponseRequest
from mlxserver.api.schema.parameters import ValidationFailed, json_schema
from mlxserver.config.settings import Settings
from mlxserver.engine.conversation import Image, Text, ToolResult
from tests.support.images import png

DATA, OTHER = png(), png((9, 9, 9))
BASE64 = base64.b64encode(DATA).decode()
URL = f"data:image/png;base64,{BASE64}"
OTHER_URL = f"data:image/jpeg;base64,{base64.b64encode(OTHER).decode()}"  # its name decides nothing
SCHEMAS = {
    ChatDialect: ChatCompletionRequest,
    ResponsesDialect: ResponseRequest,
    MessagesDialect: MessagesRequest,
    OllamaChatDialect: OllamaChatRequest,
    OllamaGenerateDialect: OllamaGenerateRequest,
}


def prompt(dialect, settings=None, **fields):
    body = {"model": "m", **fields}
    jsonschema.validate(body, json_schema(SCHEMAS[dialect]))
    return dialect(settings or Settings()).parse(json.dumps(body).encode()).requests[0].prompt


def conversation(dialect, **fields):
    return prompt(dialect, **fields).conversation


def refusal(dialect, **fields):
    with pytest.raises(ValidationFailed) as caught:
        dialect(Settings()).parse(json.dumps({"model": "m", **fields}).encode())
    assert len(caught.value.message) < 400
    return caught.value


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words, kind="text"):
    return {"type": kind, "text": words}


def image_url(url=URL, **fields):
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def source(**fields):
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64} | fields}


def test_a_chats_images_stand_among_its_texts():
    (message,) = conversation(
        ChatDialect,
        messages=[user(text("a"), text("b"), image_url(detail="low"), text("c"), image_url(OTHER_URL), image_url())],
    )
    assert message.parts == (
        Text("ab"),
        Image(DATA, "messages[0].content[2].image_url", detail="low"),
        Text("c"),
        Image(OTHER, "messages[0].content[4].image_url"),
        Image(DATA, "messages[0].content[5].image_url"),
    )


@pytest.mark.parametrize(
    ("part", "detail"),
    [
        ({"type": "image_url", "image_url": URL}, "auto"),
        ({"type": "input_image", "image_url": URL, "detail": "high"}, "high"),
        (image_url(detail=None), "auto"),
        (image_url(detail="original"), "high"),
    ],
)
def test_a_chats_image_may_be_a_string(part, detail):
    (message,) = conversation(ChatDialect, messages=[user(part)])
    assert message.parts == (Image(DATA, "messages[0].content[0].image_url", detail=detail),)


def test_a_chats_earlier_turns_and_results_have_images():
    first, _, result, last = conversation(
        ChatDialect,
        messages=[
            user(image_url()),
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": [text("seen"), image_url(OTHER_URL)]},
            user(text("And?")),
        ],
    )
    assert first.images[0].data == DATA
    assert result.parts == (ToolResult("c", "seen", images=(Image(OTHER, "messages[2].content[1].image_url"),)),)
    assert last.images == ()


def test_a_responses_items_have_images():
    first, result = conversation(
        ResponsesDialect,
        input=[
            user(text("a", "input_text"), {"type": "input_image", "image_url": URL, "detail": "low"}),
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_image", "image_url": OTHER_URL}, text("seen", "input_text")],
            },
        ],
    )
    assert first.parts == (Text("a"), Image(DATA, "input[0].content[1].image_url", detail="low"))
    assert result.parts == (ToolResult("c", "seen", images=(Image(OTHER, "input[1].output[0].image_url"),)),)


def test_a_responses_images_are_kept_with_it():
    """The next response sees them again, and the list of its items shows them as they were sent."""
    dialect = ResponsesDialect(Settings())
    items = [
        user(text("a", "input_text"), {"type": "input_image", "image_url": URL}),
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_image", "image_url": OTHER_URL, "detail": "low"}],
        },
    ]
    call = dialect.parse(json.dumps({"model": "m", "input": items}).encode())
    kept = call.for_client(call, "me").encoder.keep
    kept({"id": "resp_1", "output": []})
    stored = dialect.store.get("me", "resp_1").input_items
    assert stored[0]["content"] == [
        text("a", "input_text"),
        {"type": "input_image", "image_url": URL, "detail": "auto"},
    ]
    assert stored[1]["output"] == [{"type": "input_image", "image_url": OTHER_URL, "detail": "low"}]
    after = dialect.parse(json.dumps({"model": "m", "input": "And?", "previous_response_id": "resp_1"}).encode())
    messages = after.for_client(after, "me").requests[0].prompt.conversation
    assert [image.data for message in messages for image in message.images] == [DATA, OTHER]


def test_a_messages_images_stand_among_its_texts_and_in_results():
    result, message = conversation(
        MessagesDialect,
        messages=[
            user(
                {
                    "type": "tool_result",
                    "tool_use_id": "c",
                    "content": [text("seen"), source(), text("twice"), source(data=base64.b64encode(OTHER).decode())],
                },
                text("a"),
                text("b"),
                source(),
                text("c"),
            )
        ],
    )
    place = "messages[0].content[0].content"
    images = (Image(DATA, f"{place}[1]"), Image(OTHER, f"{place}[3]"))
    assert result.parts == (ToolResult("c", "seen\n\ntwice", images=images),)
    assert message.parts == (Text("a\n\nb"), Image(DATA, "messages[0].content[3]"), Text("c"))


def test_a_message_of_images_alone_is_one():
    (message,) = conversation(MessagesDialect, messages=[user(source())])
    assert message.parts == (Image(DATA, "messages[0].content[0]"),)
    (message,) = conversation(OllamaChatDialect, messages=[{"role": "user", "images": [BASE64]}])
    assert message.parts == (Image(DATA, "messages[0].images[0]"),)


def test_a_documents_content_may_have_images():
    document = {"type": "document", "title": "T", "source": {"type": "content", "content": [text("a"), source()]}}
    (message,) = conversation(MessagesDialect, messages=[user(document, text("b"))])
    assert message.parts == (Text("T\n\na"), Image(DATA, "messages[0].content[0].content[1]"), Text("b"))


def test_ollamas_images_stand_before_the_text():
    first, _, result = conversation(
        OllamaChatDialect,
        messages=[
            {"role": "user", "content": "a", "images": [BASE64, OTHER_URL]},
            {"role": "assistant", "content": "b", "images": None},
            {"role": "tool", "content": "seen", "tool_name": "look", "images": [BASE64]},
        ],
    )
    assert first.parts == (Image(DATA, "messages[0].images[0]"), Image(OTHER, "messages[0].images[1]"), Text("a"))
    assert result.parts == (ToolResult("", "seen", "look", (Image(DATA, "messages[2].images[0]"),)),)


def test_ollamas_prompt_has_images():
    system, message = conversation(OllamaGenerateDialect, prompt="a", system="s", images=[BASE64])
    assert system.text == "s"
    assert message.parts == (Image(DATA, "images[0]"), Text("a"))
    (message,) = conversation(OllamaGenerateDialect, images=[BASE64])
    assert message.parts == (Image(DATA, "images[0]"),)


def test_base64_in_lines_is_base64():
    lines = base64.encodebytes(DATA).decode()
    (message,) = conversation(MessagesDialect, messages=[user(source(data=lines))])
    assert message.images[0].data == DATA


@pytest.mark.parametrize(
    ("dialect", "fields", "origin"),
    [
        (ChatDialect, {"messages": [user(image_url("https://example.org/a.png"))]}, "messages[0].content[0].image_url"),
        (
            ResponsesDialect,
            {"input": [user({"type": "input_image", "image_url": "HTTP://example.org/a"})]},
            "input[0].content[0].image_url",
        ),
        (
            MessagesDialect,
            {"messages": [user({"type": "image", "source": {"type": "url", "url": "http://example.org/a"}})]},
            "messages[0].content[0]",
        ),
    ],
)
def test_a_url_is_kept_for_the_server(dialect, fields, origin):
    (message,) = conversation(dialect, **fields)
    (image,) = message.images
    assert (image.data, image.origin) == (b"", origin)
    assert image.url.lower().startswith(("http://example.org", "https://example.org"))


CHAT = "messages[0].content[0].image_url.url"
REFUSED = {
    "file": (ChatDialect, {"messages": [user(image_url("file:///etc/passwd"))]}, CHAT),
    "path": (ChatDialect, {"messages": [user(image_url("/etc/passwd"))]}, CHAT),
    "ftp": (ChatDialect, {"messages": [user(image_url("ftp://example.org/a.png"))]}, CHAT),
    "long url": (ChatDialect, {"messages": [user(image_url("https://example.org/" + "a" * 9000))]}, CHAT),
    "empty": (ChatDialect, {"messages": [user(image_url(""))]}, CHAT),
    "number": (ChatDialect, {"messages": [user(image_url(5))]}, CHAT),
    "no url": (ChatDialect, {"messages": [user({"type": "image_url", "image_url": {}})]}, CHAT),
    "no base64": (ChatDialect, {"messages": [user(image_url("data:image/png,abc"))]}, CHAT),
    "no comma": (ChatDialect, {"messages": [user(image_url("data:image/png;base64"))]}, CHAT),
    "wrong letters": (ChatDialect, {"messages": [user(image_url(URL + "!"))]}, CHAT),
    "wrong padding": (ChatDialect, {"messages": [user(image_url("data:image/png;base64,QQ"))]}, CHAT),
    "beyond ascii": (ChatDialect, {"messages": [user(image_url("data:image/png;base64,é" + "a" * 10**6))]}, CHAT),
    "detail": (
        ChatDialect,
        {"messages": [user(image_url(detail="sharp"))]},
        "messages[0].content[0].image_url.detail",
    ),
    "detail of a list": (
        ResponsesDialect,
        {"input": [user({"type": "input_image", "image_url": URL, "detail": []})]},
        "input[0].content[0].detail",
    ),
    "image of an answer": (
        ChatDialect,
        {"messages": [{"role": "assistant", "content": [image_url()]}]},
        "messages[0].content[0]",
    ),
    "image of a system": (
        ChatDialect,
        {"messages": [{"role": "system", "content": [image_url()]}]},
        "messages[0].content[0]",
    ),
    "image of a developer": (
        ResponsesDialect,
        {"input": [{"role": "developer", "content": [{"type": "input_image", "image_url": URL}]}]},
        "input[0].content[0]",
    ),
    "audio": (ChatDialect, {"messages": [user({"type": "input_audio"})]}, "messages[0].content[0].type"),
    "file id": (
        ResponsesDialect,
        {"input": [user({"type": "input_image", "file_id": "file_1"})]},
        "input[0].content[0].file_id",
    ),
    "file id in a result": (
        ResponsesDialect,
        {
            "input": [
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [{"type": "input_image", "file_id": "f"}],
                }
            ]
        },
        "input[0].output[0].file_id",
    ),
    "file source": (
        MessagesDialect,
        {"messages": [user({"type": "image", "source": {"type": "file", "file_id": "file_1"}})]},
        "messages[0].content[0].source.file_id",
    ),
    "source of another type": (
        MessagesDialect,
        {"messages": [user(source(type="text"))]},
        "messages[0].content[0].source.type",
    ),
    "source's base64": (
        MessagesDialect,
        {"messages": [user(source(data="?"))]},
        "messages[0].content[0].source.data",
    ),
    "source's url": (
        MessagesDialect,
        {"messages": [user({"type": "image", "source": {"type": "url", "url": "file:///a"}})]},
        "messages[0].content[0].source.url",
    ),
    "image of a system's": (MessagesDialect, {"messages": [user(text("a"))], "system": [source()]}, "system[0]"),
    "ollama's": (OllamaGenerateDialect, {"prompt": "a", "images": [BASE64, "?"]}, "images[1]"),
    "ollama's number": (OllamaGenerateDialect, {"prompt": "a", "images": [5]}, "images[0]"),
    "ollama's url": (OllamaGenerateDialect, {"prompt": "a", "images": ["https://example.org/a.png"]}, "images[0]"),
    "raw": (OllamaGenerateDialect, {"prompt": "a", "images": [BASE64], "raw": True}, "images"),
    "suffix": (OllamaGenerateDialect, {"prompt": "a", "images": [BASE64], "suffix": "b"}, "images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_by_its_place(name):
    dialect, fields, param = REFUSED[name]
    error = refusal(dialect, **fields)
    assert error.param == param
    assert f"'{param}'" in error.message


LARGE = "A" * 4_000_000
SMALL_LIMIT = Settings(max_prompt_bytes=1000)


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        (ChatDialect, {"messages": [user(image_url(f"data:image/png;base64,{LARGE}"))]}),
        (
            ResponsesDialect,
            {
                "input": [
                    user({"type": "input_image", "image_url": f"data:image/png;base64,{LARGE}"}),
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_image", "image_url": f"data:image/png;base64,{LARGE}"}],
                    },
                ]
            },
        ),
        (
            MessagesDialect,
            {"messages": [user(source(data=LARGE), {"type": "tool_result", "content": [source(data=LARGE)]})]},
        ),
        (OllamaChatDialect, {"messages": [{"role": "user", "images": [LARGE]}]}),
        (OllamaGenerateDialect, {"images": [LARGE]}),
    ],
    ids=["chat", "responses", "messages", "ollama chat", "ollama generate"],
)
def test_images_are_not_counted_as_text_of_the_prompt(dialect, fields):
    assert len(prompt(dialect, SMALL_LIMIT, **fields).conversation[-1].images[0].data) == 3_000_000


def test_the_text_beside_an_image_has_its_limit():
    messages = [user(text("a" * 1001), image_url())]
    with pytest.raises(ValidationFailed, match="makes the prompt 1... bytes long"):
        prompt(ChatDialect, SMALL_LIMIT, messages=messages)
    call = {"function": {"name": "f", "arguments": {"images": ["a" * 1001]}}}  # no images of the conversation
    with pytest.raises(ValidationFailed, match="the limit of this server"):
        prompt(OllamaChatDialect, SMALL_LIMIT, messages=[{"role": "assistant", "tool_calls": [call]}])
