"""Ollama's API over real sockets, with its own SDK: what it answers is of the SDK's types, line by line."""

import asyncio
import json

import ollama
import pytest

from tests.support.published import check
from tools.harness.running_server import eventually, running_server

USER, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"
CONTEXT = 2048
TEXT_MODEL = (
    "Model 'talker' is a text model: it answers conversations and goes on from prompts, and makes no embeddings."
)
HELLO = "Hello there, and hello there again."
ASK = [{"role": "user", "content": "hello"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path, tiny_llama_path):
    """Keys, a scripted model that may think, one that doesn't, and a tiny one that is not loaded."""
    path = tmp_path_factory.mktemp("config") / "models.toml"
    path.write_text(
        f'api_key = ["{USER}"]\nadmin_key = ["{ADMIN}"]\nheartbeat_interval = 0.005\n'
        f'[models.talker]\nsource = "{scripted_path}"\ntype = "instruction"\naliases = ["gpt-*", "mini"]\n'
        f"preload = true\n[models.talker.defaults]\ntop_p = 0.5\n"
        f'[models.thinker]\nsource = "{scripted_path}"\ntype = "thinking"\naliases = ["gpt-4*"]\n'
        f'[models.tiny]\nsource = "{tiny_llama_path}"\ncontext_length = {CONTEXT}\n'
    )
    with running_server("--no-defaults", "--config", str(path), "--log-level", "warning") as server:
        yield server


def client_of(server, key=USER):
    return ollama.Client(server.url, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def admin(server):
    with client_of(server, ADMIN) as client:
        yield client


def ask(server, path, body=None, key=USER, method="POST", **headers):
    headers = {"Authorization": f"Bearer {key}", **headers}
    return server.ask(method, path, None if body is None else json.dumps(body).encode(), headers)


def lines(server, path, **body):
    """The lines of a stream, each of the published schema and of the SDK's type."""
    answer = ask(server, path, body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson"), answer.body
    name, kind = {
        "/api/chat": ("OllamaChat", ollama.ChatResponse),
        "/api/generate": ("OllamaGenerate", ollama.GenerateResponse),
        "/api/pull": ("OllamaProgress", ollama.ProgressResponse),
    }[path]
    for line in answer.body.splitlines():
        kind.model_validate_json(line, strict=True)
    return [check(json.loads(line), name) for line in answer.body.splitlines()]


def refusal(call):
    with pytest.raises(ollama.ResponseError) as caught:
        answer = call()
        list(answer) if hasattr(answer, "__next__") else None
    return caught.value


# Answers


def test_a_chat_is_the_same_streamed_and_whole(server, client):
    streamed = lines(server, "/api/chat", model="talker", messages=ASK)
    assert "".join(line["message"]["content"] for line in streamed) == HELLO
    assert [line["done"] for line in streamed[:-1]] == [False] * (len(streamed) - 1)
    answer = client.chat("talker", ASK)
    assert (answer.message.content, answer.done, answer.done_reason) == (HELLO, True, "stop")
    last = streamed[-1]
    assert (last["prompt_eval_count"], last["eval_count"]) == (answer.prompt_eval_count, answer.eval_count)
    assert answer.total_duration >= answer.eval_duration > 0
    assert "".join(part.message.content for part in client.chat("talker", ASK, stream=True)) == HELLO


def test_a_prompt_is_the_same_streamed_and_whole(server, client):
    streamed = lines(server, "/api/generate", model="talker", prompt="hello")
    assert "".join(line["response"] for line in streamed) == HELLO
    assert client.generate("talker", "hello").response == HELLO
    assert "".join(part.response for part in client.generate("talker", "hello", stream=True)) == HELLO


def test_the_asynchronous_sdk_reads_the_same(server):
    async def read():
        async with ollama.AsyncClient(server.url, headers={"Authorization": f"Bearer {USER}"}) as client:
            whole = await client.chat("talker", ASK)
            parts = [part async for part in await client.chat("talker", ASK, stream=True)]
            prompt = [part async for part in await client.generate("talker", "hello", stream=True)]
            shown, listed, loaded = await client.show("talker"), await client.list(), await client.ps()
            pulled = [step async for step in await client.pull("talker", stream=True)]
        assert whole.message.content == "".join(part.message.content for part in parts) == HELLO
        assert "".join(part.response for part in prompt) == HELLO
        assert (shown.details.family, pulled[-1].status) == ("llama", "success")
        assert {model.model for model in loaded.models} <= {model.model for model in listed.models}

    asyncio.run(read())


def test_thinking_is_a_field_and_can_be_turned_off(server, client):
    thought = client.chat("thinker", [{"role": "user", "content": "think"}])
    assert (thought.message.thinking, thought.message.content) == ("Two and two are four.", "It is four.")
    streamed = lines(server, "/api/chat", model="thinker", messages=[{"role": "user", "content": "think"}])
    assert "".join(line["message"].get("thinking", "") for line in streamed).strip() == thought.message.thinking
    assert "".join(line["message"]["content"] for line in streamed).strip() == thought.message.content
    assert client.generate("thinker", "think", think="high").thinking == thought.message.thinking
    assert client.generate("thinker", "hello", think=False).response == HELLO
    assert client.generate("talker", "hello", think=True).response == HELLO


def test_tools_are_called_and_their_results_are_read(server, client):
    asked = [{"role": "user", "content": "tool"}]
    streamed = lines(server, "/api/chat", model="talker", messages=asked, tools=[ADD])
    (calls,) = [line["message"]["tool_calls"] for line in streamed if "tool_calls" in line["message"]]
    assert [call["function"]["arguments"] for call in calls] == [{"a": 1, "b": 2}]
    answer = client.chat("talker", asked, tools=[ADD])
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments, answer.done_reason) == ("add", {"a": 1, "b": 2}, "stop")
    history = [*asked, answer.message, {"role": "tool", "content": "3", "tool_name": "add"}, *ASK]
    assert client.chat("talker", history, tools=[ADD]).message.content == HELLO


def test_a_python_function_is_a_tool(client):
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    answer = client.chat("talker", [{"role": "user", "content": "tool"}], tools=[add])
    assert answer.message.tool_calls[0].function.name == "add"


def test_a_format_is_enforced(client):
    fields = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
    schema = {**fields, "additionalProperties": False}
    assert json.loads(client.chat("tiny", ASK, format=schema).message.content).keys() == {"n"}
    limited = {"num_predict": 400, "temperature": 0, "seed": 1}
    assert client.generate("tiny", "hello", format="json", options=limited).response.lstrip().startswith("{")


def test_options_have_their_effect(client):
    answer = client.chat("talker", ASK, options={"num_predict": 3})
    assert (answer.eval_count, answer.done_reason) == (3, "length")
    assert client.chat("talker", ASK, options=ollama.Options(stop=["and"], num_ctx=8192)).message.content == (
        "Hello there, "
    )
    seeded = [client.generate("tiny", "x", options={"seed": 5, "num_predict": 8}).response for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_logprobs_are_told(client):
    answer = client.chat("talker", ASK, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == answer.eval_count - 1  # the end of the turn has no text
    assert all(len(token.top_logprobs) == 2 for token in answer.logprobs)


def test_raw_text_is_continued_without_the_template(client):
    options = {"num_predict": 1, "temperature": 0}
    raw, templated = (client.generate("tiny", "hello", raw=raw, options=options) for raw in (True, False))
    assert raw.prompt_eval_count < templated.prompt_eval_count


def test_names_that_fit_a_pattern_are_served_and_named(server, client):
    for name in ("gpt-3.5-turbo", "gpt-3.5-turbo:latest", "mini", "talker:latest"):
        assert client.chat(name, ASK).model == name
    answer = ask(server, "/v1/chat/completions", {"model": "gpt-4o-mini", "messages": ASK}).json
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("gpt-4o-mini", HELLO)
    asked = [{"role": "user", "content": "think"}]
    assert client.chat("gpt-4o", asked).message.thinking  # the longest pattern counts
    models = ask(server, "/v1/models", method="GET").json["data"]
    assert [model["id"] for model in models] == ["talker", "thinker", "tiny"]
    assert models[0]["aliases"] == ["gpt-*", "mini"]


# Loading and unloading


def status_of(server, key):
    return ask(server, f"/v1/models/{key}", method="GET").json["status"]["value"]


def test_an_empty_request_loads_and_keep_alive_zero_unloads(server, client):
    for load in (client.chat, client.generate):
        assert load("tiny").done_reason == "load"
        assert "tiny:latest" in [model.model for model in client.ps().models]
        answer = load("tiny", keep_alive=0)
        assert (answer.done, answer.done_reason) == (True, "unload")
        assert eventually(lambda: "tiny:latest" not in [model.model for model in client.ps().models])
        assert load("tiny", keep_alive=0).done_reason == "unload"  # which loads nothing
        assert eventually(lambda: status_of(server, "tiny") == "unloaded")
    *waited, line = lines(server, "/api/generate", model="tiny", keep_alive="10m")
    assert (line["response"], line["done_reason"]) == ("", "load")
    assert not any(line["response"] for line in waited)
    (tiny,) = [model for model in client.ps().models if model.model == "tiny:latest"]
    assert tiny.expires_at.year < 9999
    client.chat("tiny", ASK, options={"num_predict": 2}, keep_alive=0)
    assert eventually(lambda: "tiny:latest" not in [model.model for model in client.ps().models])


# Models


def test_models_are_listed_and_shown(client):
    listed = {model.model: model for model in client.list().models}
    assert [*listed] == ["talker:latest", "thinker:latest", "tiny:latest"]
    assert listed["tiny:latest"].details.parameter_size == "122.2K"
    assert listed["tiny:latest"].size > 100_000
    assert len({model.digest for model in listed.values()}) == 2  # two have one source
    shown = client.show("tiny:latest")
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == CONTEXT
    assert "messages" in shown.template
    assert client.show("talker").parameters == "top_p 0.5"
    assert "thinking" in client.show("thinker").capabilities
    loaded = client.ps().models[0]
    assert (loaded.model, loaded.size > 0, loaded.context_length > 0) == ("talker:latest", True, True)


def test_both_names_of_a_model_are_taken(server):
    for body in ({"model": "talker"}, {"name": "talker:latest"}):
        check(ask(server, "/api/show", body).json, "OllamaShown")
    assert ask(server, "/api/show", {}).status == 400


def test_a_copy_is_one_more_name_until_it_is_deleted(server, client, admin):
    assert admin.copy("talker", "copied:latest").status == "success"
    assert admin.copy("talker", "copied").status == "success"
    assert "copied:latest" in [model.model for model in client.list().models]
    assert client.chat("copied", ASK).model == "copied"
    assert "copied" in ask(server, "/v1/models/talker", method="GET").json["aliases"]
    admin.copy("thinker", "copied")
    assert "thinking" in client.show("copied").capabilities
    assert admin.delete("copied").status == "success"
    assert refusal(lambda: client.chat("copied", ASK)).status_code == 404


def test_a_name_that_is_taken_is_not_copied_over(admin):
    for name in ("tiny", "mini"):
        assert refusal(lambda name=name: admin.copy("thinker", name)).status_code == 409
    assert refusal(lambda: admin.copy("nothing", "x")).status_code == 404
    assert refusal(lambda: admin.copy("talker", "a b")).status_code == 400


def test_what_is_configured_is_not_deleted(admin):
    for name in ("talker", "mini", "gpt-4o"):
        error = refusal(lambda name=name: admin.delete(name))
        assert error.status_code == 400
        assert name in error.error


def test_a_pull_registers_and_loads_and_a_delete_removes(server, client, admin, tiny_llama_path):
    source = str(tiny_llama_path)
    steps = [step.status for step in admin.pull(source, stream=True)]
    assert (steps[0], steps[-1]) == ("pulling manifest", "success")
    assert admin.pull(source).status == "success"  # it is there
    assert client.generate(source, "x", options={"num_predict": 2}).eval_count == 2
    assert admin.delete(source).status == "success"
    assert refusal(lambda: client.show(source)).status_code == 404


def test_a_pull_of_what_is_registered_takes_no_admin_key(server, client):
    assert client.pull("thinker").status == "success"
    steps = lines(server, "/api/pull", name="thinker")
    assert [step["status"] for step in steps] == ["pulling manifest", "success"]


def test_a_pull_that_fails_has_its_status_or_a_line(server, admin, tmp_path):
    assert refusal(lambda: admin.pull("no-such-model")).status_code == 400
    (tmp_path / "config.json").write_text("{}")
    assert refusal(lambda: admin.pull(str(tmp_path), stream=True)).error
    assert refusal(lambda: admin.show(str(tmp_path))).status_code == 404


def test_what_manages_takes_an_admin_key(client):
    for call in (
        lambda: client.copy("talker", "x"),
        lambda: client.delete("talker"),
        lambda: client.pull("org/none"),
        lambda: client.pull("/etc/passwd"),
    ):
        assert refusal(call).status_code == 403


# Refusals


def test_errors_are_ollamas_at_every_path(server, client):
    for path, body, status in (
        ("/api/chat", {"model": "nothing", "messages": ASK}, 404),
        ("/api/generate", {"model": "talker", "prompt": "x", "suffix": "y"}, 400),
        ("/api/show", {"model": "nothing"}, 404),
        ("/api/push", {"model": "talker"}, 404),
        ("/api/create", {"model": "talker"}, 404),
        ("/api/blobs/sha256:0", {}, 404),
        ("/api/tags", {}, 405),
    ):
        answer = ask(server, path, body)
        assert answer.status == status, path
        check(answer.json, "OllamaError")
    assert check(ask(server, "/api/tags", key="wrong", method="GET").json, "OllamaError")["error"]
    error = refusal(lambda: client.chat("tiny", [{"role": "user", "content": "word " * 3000}]))
    assert error.status_code == 400
    assert f"maximum context length is {CONTEXT} tokens" in error.error


def test_embeddings_are_refused_with_the_models_name(client):
    for call in (lambda: client.embed("talker", ["a", "b"]), lambda: client.embeddings("talker", "a")):
        error = refusal(call)
        assert (error.status_code, error.error) == (400, TEXT_MODEL)
    assert refusal(lambda: client.embed("nothing", "a")).status_code == 404


def test_ignored_options_are_named_in_a_header(server):
    body = {"model": "talker", "messages": ASK, "options": {"mirostat": 2, "num_ctx": 4096}, "shift": True}
    assert ask(server, "/api/chat", body).headers["x-ignored-parameters"] == "shift, options.mirostat"


# What programs look for


def test_the_root_is_text_for_programs_and_a_page_for_browsers(server):
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        answer = ask(server, "/", method="GET", **headers)
        assert (answer.status, answer.body) == (200, b"Ollama is running")
    answer = ask(server, "/", method="GET", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert answer.headers["content-type"].startswith("text/html")
    assert (answer.status, answer.headers["vary"]) == (200, "Accept")
    for path in ("/", "/api/version", "/api/tags"):
        answer = ask(server, path, method="HEAD")
        assert (answer.status, answer.body) == (200, b"")
    spoken = check(ask(server, "/api/version", method="GET").json, "OllamaVersion")["version"]
    assert [int(part) for part in spoken.split(".")] >= [0, 6, 4]  # what editors ask for


OPEN_WEBUI = {
    "options": {"num_ctx": 8192, "temperature": 0.7, "mirostat": 0, "repeat_penalty": 1.1, "num_predict": 128},
    "stream": True,
    "keep_alive": "5m",
    "think": False,
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello", "images": []}],
    "tools": [ADD],
}
HOME_ASSISTANT = {
    "messages": ASK,
    "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}],
    "stream": True,
    "think": False,
    "keep_alive": "-1s",
    "options": {"num_ctx": 8192},
}  # fmt: skip
LANGCHAIN = {
    "messages": [*ASK, {"role": "assistant", "content": "", "images": [], "tool_calls": [
        {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "images": [], "tool_call_id": "call_1"}, *ASK],
    "format": "",
    "keep_alive": None,
    "options": {"temperature": None, "stop": None, "num_predict": None, "seed": None},
    "stream": True,
}  # fmt: skip
ZED = {"messages": ASK, "stream": True, "keep_alive": -1, "options": {"num_ctx": 16384, "stop": []}, "think": None}


@pytest.mark.parametrize(
    "body", [OPEN_WEBUI, HOME_ASSISTANT, LANGCHAIN, ZED], ids=["open-webui", "ha", "langchain", "zed"]
)
def test_what_programs_send_is_answered(server, body):
    answer = lines(server, "/api/chat", model="talker:latest", **body)
    assert "".join(line["message"]["content"] for line in answer) == HELLO


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_stream_that_waits_for_its_model_has_heartbeats_that_are_lines(server, path):
    ask(server, "/v1/models/unload", {"key": "tiny"}, key=ADMIN)
    question = {"messages": ASK} if path == "/api/chat" else {"prompt": "hello"}
    *before, last = lines(server, path, model="tiny", options={"num_predict": 2}, **question)
    assert last["eval_count"] == 2
    assert len(before) > 2  # two tokens make two lines at most
    assert not any(line["done"] for line in before)


# Between dialects


def chat_completion(server, messages):
    """Answer, and tokens of the prompt and of those that were cached."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = ask(server, "/v1/chat/completions", body).json
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"], cached


def ollama_chat(server, messages):
    body = {"model": "tiny", "messages": messages, "options": {"num_predict": 8, "temperature": 0}, "stream": False}
    before = cached_tokens(server)
    answer = ask(server, "/api/chat", body).json
    return answer["message"]["content"], answer["prompt_eval_count"], cached_tokens(server) - before


def cached_tokens(server):
    """Tokens of all prompts to the model that came from the prefix cache."""
    text = ask(server, "/metrics", key=ADMIN, method="GET").body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith('mlx_server_cached_tokens_total{model="tiny"')]
    return int(float(line.rpartition(" ")[2]))


def anthropic_message(server, messages):
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = ask(server, "/v1/messages", body, **{"anthropic-version": "2023-06-01"}).json
    usage = answer["usage"]
    cached = usage["cache_read_input_tokens"]
    tokens = usage["input_tokens"] + cached + (usage["cache_creation_input_tokens"] or 0)
    return "".join(part["text"] for part in answer["content"]), tokens, cached


def response(server, messages):
    body = {"model": "tiny", "input": messages, "max_output_tokens": 8, "temperature": 0}
    answer = ask(server, "/v1/responses", body).json
    text = "".join(part["text"] for item in answer["output"] for part in item["content"])
    return text, answer["usage"]["input_tokens"], answer["usage"]["input_tokens_details"]["cached_tokens"]


DIALECTS = {"chat": chat_completion, "ollama": ollama_chat, "messages": anthropic_message, "responses": response}


@pytest.mark.parametrize("first", DIALECTS)
@pytest.mark.parametrize("then", DIALECTS)
def test_a_conversation_moves_between_dialects_with_its_prefix(server, first, then):
    """The prompt of a later turn is the same in every dialect, and reuses what an earlier turn computed in another."""
    messages = [{"role": "user", "content": f"Tell me of {first} and then of {then}, at some length. " * 8}]
    text, tokens, _ = DIALECTS[first](server, messages)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    moved = DIALECTS[then](server, messages)
    stayed = DIALECTS[first](server, messages)
    assert moved[:2] == stayed[:2]
    assert moved[2] >= tokens - 16
