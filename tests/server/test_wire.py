"""What each parameter does, seen through the wire, on scripted and tiny models."""

import json

import pytest

from tests.support.published import check
from tools.harness.models import scripted_model
from tools.harness.running_server import eventually, running_server

HELLO = "Hello there, and hello there again."
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}

FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@pytest.fixture(scope="module")
def flags(tmp_path_factory, scripted_path, tiny_llama_path):
    scripted = {"source": str(scripted_path), "type": "instruction", "preload": True}
    models = {
        "talker": scripted,
        "thinker": {**scripted, "type": "thinking"},
        "tiny": {"source": str(tiny_llama_path), "preload": True},
        "filler": {"source": str(scripted_model(tmp_path_factory.mktemp("filler"), {"x": "Hi."}, tokens=FIM))},
    }
    lines = []
    for key, fields in models.items():
        lines += [f"[models.{key}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    path = tmp_path_factory.mktemp("config") / "models.toml"
    path.write_text("\n".join(lines))
    return ("--no-defaults", "--config", str(path), "--log-level", "warning")


@pytest.fixture(scope="module")
def server(flags):
    with running_server(*flags) as server:
        yield server


def completed(server, text="hello", model="talker", **parameters):
    answer = server.chat(model, text, **parameters)
    assert answer.status == 200, answer.body
    return check(answer.json, "ChatCompletion")


def complete(server, prompt, model="tiny", **parameters):
    answer = server.post("/v1/completions", {"model": model, "prompt": prompt, **parameters})
    assert answer.status == 200, answer.body
    return check(answer.json, "Completion")


def texts(answer):
    return [choice.get("message", {}).get("content", choice.get("text")) for choice in answer["choices"]]


def refused(server, path="/v1/chat/completions", **body):
    answer = server.post(path, {"model": "tiny", **body})
    assert answer.status == 400, answer.body
    return answer.error["param"]


# Sampling


def test_n_answers_come_from_one_prompt(server):
    answer = completed(server, "hello", "tiny", n=3, max_tokens=6, temperature=1, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 18
    assert (
        answer["usage"]["prompt_tokens"] == completed(server, "hello", "tiny", max_tokens=1)["usage"]["prompt_tokens"]
    )


def test_n_choices_of_a_stream_are_kept_apart(server):
    with server.stream("talker", "hello", n=2, stream_options={"include_usage": True}) as stream:
        *payloads, last, _ = [check(p, "ChatCompletionChunk") if p != "[DONE]" else p for p in stream]
    for index in (0, 1):
        mine = [c for p in payloads for c in p["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == HELLO
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
    assert last["usage"]["completion_tokens"] == 14
    assert last["timings"]["predicted_n"] == 14


def test_logit_bias_decides(server):
    answer = complete(server, "The", logit_bias={"70": 100}, temperature=0, max_tokens=3)
    assert texts(answer) == [server.post("/detokenize", {"model": "tiny", "tokens": [70] * 3}).json["prompt"]]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}],
    ids=str,
)
def test_every_filter_can_leave_the_likeliest_alone(server, settings):
    likeliest = texts(complete(server, "The quick", temperature=0, max_tokens=8))
    assert texts(complete(server, "The quick", max_tokens=8, **settings)) == likeliest


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_make_an_answer_differ(server, name):
    greedy = {"temperature": 0, "max_tokens": 60}
    assert texts(complete(server, "The", **greedy)) != texts(complete(server, "The", **greedy, **{name: 2}))


def test_a_seed_repeats_and_no_seed_does_not(server):
    def draw(**parameters):
        return texts(complete(server, "The", temperature=1.5, max_tokens=20, **parameters))

    assert draw(seed=5) == draw(seed=5) != draw(seed=6)
    assert draw() != draw()


# Limits and stops


def test_ignoring_the_end_goes_on_to_the_limit(server):
    answer = completed(server, "hello", ignore_eos=True, max_tokens=20)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (20, "length")
    assert "<|im_end|>" not in texts(answer)[0]


def test_min_tokens_keeps_the_end_away(server):
    answer = completed(server, "hello", min_tokens=12, max_tokens=30)
    assert answer["usage"]["completion_tokens"] >= 12


def test_a_stop_string_is_found_across_tokens(server):
    assert texts(completed(server, "hello", stop=["re, a"])) == ["Hello the"]


# Log-probabilities


def test_logprobs_are_of_every_content_token(server):
    answer = completed(server, "hello", logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(bytes(token["bytes"]).decode() for token in content) == HELLO
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]


def test_logprobs_come_with_their_text_in_a_stream(server):
    with server.stream("talker", "emoji", logprobs=True) as stream:
        choices = [p["choices"][0] for p in stream if p != "[DONE]"]
    for choice in choices:
        if "content" in choice["delta"]:
            raw = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
            assert raw.decode() == choice["delta"]["content"]


# Reasoning


def test_reasoning_goes_where_the_request_asks(server):
    apart = completed(server, "think", "thinker", reasoning_format="reasoning")["choices"][0]["message"]
    assert (apart["reasoning"], apart["content"]) == ("Two and two are four.", "It is four.")
    inline = completed(server, "think", "thinker", reasoning_format="inline")["choices"][0]["message"]
    assert inline["content"] == "<think>\nTwo and two are four.\n</think>\n\nIt is four."
    assert inline.keys() == {"role", "content", "refusal"}


# Tools


def test_a_call_that_the_model_makes_is_a_tool_call(server):
    choice = completed(server, "tool", tools=[ADD])["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1, "b": 2})


def test_a_streamed_call_is_the_whole_one(server):
    with server.stream("talker", "tool", tools=[ADD]) as stream:
        deltas = [p["choices"][0]["delta"] for p in stream if p != "[DONE]"]
    deltas = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert (deltas[0]["id"][:5], deltas[0]["function"]["name"]) == ("call_", "add")
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"a": 1, "b": 2}


def test_no_tools_are_called_where_none_may_be(server):
    message = completed(server, "tool", tools=[ADD], tool_choice="none")["choices"][0]["message"]
    assert "tool_calls" not in message


def test_a_forced_call_is_made_even_by_a_model_that_knows_no_tools(server):
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        answer = completed(server, "hello", "tiny", tools=[ADD], tool_choice=choice, max_tokens=300, seed=1)
        if answer["choices"][0]["finish_reason"] == "tool_calls":
            (call, *_) = answer["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == "add"
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_tool_answer_is_part_of_the_history(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "tool"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "user", "content": "hello"},
    ]
    answer = server.post("/v1/chat/completions", {"model": "talker", "messages": messages, "tools": [ADD]})
    assert answer.status == 200, answer.body


# Formats


def test_a_schema_is_enforced(server):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (text,) = texts(completed(server, "hello", "tiny", response_format=asked, max_tokens=60, seed=1))
    assert set(json.loads(text)) == {"ok"}


def test_a_schema_that_can_not_be_enforced_is_refused_with_the_reason(server):
    schema = {"type": "object", "properties": {"x": {"type": "nonsense"}}}
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    place = "response_format.json_schema.schema.properties.x.type"
    assert refused(server, messages=[{"role": "user", "content": "x"}], response_format=asked) == place


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_beside_the_type_is_enforced(server, kind):
    schema = {"type": "object", "properties": {"ok": {"const": 1}}, "required": ["ok"], "additionalProperties": False}
    (text,) = texts(completed(server, "hello", "tiny", response_format={"type": kind, "schema": schema}, seed=1))
    assert json.loads(text) == {"ok": 1}


ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"answer": {"type": "string", "maxLength": 12}},
            "required": ["answer"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model", ["talker", "thinker"])
def test_tools_beside_a_schema_can_be_called(server, model, strict):
    tools = [{**ADD, "function": {**ADD["function"], "strict": strict}}]
    answer = completed(server, "tool", model, tools=tools, response_format=ANSWER, max_tokens=60, temperature=0)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1, "b": 2})


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_answer_beside_tools_keeps_the_schema(server, choice):
    answer = completed(
        server,
        "hello",
        "tiny",
        tools=[ADD],
        tool_choice=choice,
        response_format=ANSWER,
        max_tokens=80,
        seed=1,
        logit_bias={str(server.post("/tokenize", {"model": "tiny", "prompt": "<"}).json["tokens"][-1]): -100},
    )
    (text,) = texts(answer)
    assert set(json.loads(text)) == {"answer"}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_forced_calls_come_first_beside_a_schema(server):
    answer = completed(
        server, "hello", "tiny", tools=[ADD], tool_choice="required", response_format=ANSWER, max_tokens=200, seed=1
    )
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "integer"},
            "maxProperties": 1,
        },
        {
            "type": "object",
            "properties": {"a": {"type": "string", "format": "password", "maxLength": 4}},
            "required": ["a"],
            "additionalProperties": False,
        },
    ],
)
def test_keywords_that_bind_nothing_are_taken(server, schema):
    form = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
    completed(server, "Give JSON.", "tiny", response_format=form, temperature=0, max_tokens=20)


def test_a_tool_that_can_not_be_enforced_is_named(server):
    to = {"type": "string", "pattern": r"^(?!\.)[a-z@.]+$"}
    parameters = {"type": "object", "properties": {"to": to}, "required": ["to"], "additionalProperties": False}
    mail = {"type": "function", "function": {"name": "mail", "parameters": parameters}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [ADD, mail]}
    answer = server.post("/v1/chat/completions", {**body, "tool_choice": "required", "max_tokens": 20})
    assert answer.status == 400
    assert "'mail'" in answer.error["message"] and "look-around" in answer.error["message"]
    assert answer.error["param"] == "tools[1].function.parameters.properties.to.pattern"
    assert server.post("/v1/chat/completions", {**body, "max_tokens": 1}).status == 200


# Prompts


def test_an_answer_begun_by_the_client_is_continued(server):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well"}]
    body = {"model": "talker", "messages": messages}
    another, prompt = (
        server.post("/apply-template", {**body, "continue_final_message": continues}) for continues in (False, True)
    )
    assert prompt.status == 200, prompt.body
    assert prompt.json["prompt"].rstrip().endswith("Well")
    assert "Well" in another.json["prompt"]
    assert not another.json["prompt"].rstrip().endswith("Well")


def test_images_are_refused_by_their_place(server):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    assert refused(server, messages=messages) == "messages[0].content[1].image_url"


@pytest.mark.parametrize("prompt", ["The quick", [[3, 4], [5]], ["a", "b"], [7, 8, 9]])
def test_bare_prompts_are_text_or_tokens(server, prompt):
    count = 2 if isinstance(prompt[0], (list, str)) and not isinstance(prompt, str) else 1
    answer = complete(server, prompt, max_tokens=3, n=2, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
    assert answer["usage"]["completion_tokens"] == 3 * 2 * count


def test_a_bare_prompt_is_not_set_in_a_template(server):
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "The quick"}).json["tokens"]
    answer = complete(server, "The quick", max_tokens=5, temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert texts(complete(server, tokens, max_tokens=5, temperature=0)) == texts(answer)


def test_echo_gives_the_prompt_back(server):
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "The quick"}).json["tokens"]
    for prompt in ("The quick", tokens):
        (text,) = texts(complete(server, prompt, max_tokens=3, echo=True, temperature=0))
        assert text.startswith("The quick")
        assert len(text) > len("The quick")


def test_bare_logprobs_have_the_older_shape(server):
    choice = complete(server, "The", max_tokens=4, logprobs=2, temperature=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 4
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0


def test_an_echo_with_logprobs_scores_the_prompt(server):
    """The text is the one that is generated anyway; each token begins where the text has it."""
    plain = texts(complete(server, "The quick", max_tokens=3, temperature=0))
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "The quick"}).json["tokens"]
    for prompt in ("The quick", tokens):
        answer = complete(server, prompt, max_tokens=3, echo=True, logprobs=2, temperature=0)
        (choice,) = answer["choices"]
        assert choice["text"] == "The quick" + plain[0]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(tokens) + 3
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"][: len(tokens)], logprobs["text_offset"], strict=False):
            assert "The quick".startswith(token, offset)
        assert logprobs["text_offset"][len(tokens)] == len("The quick")


def test_no_tokens_are_made_where_none_are_wanted(server):
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "The quick"}).json["tokens"]
    answer = complete(server, "The quick", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert len(choice["logprobs"]["tokens"]) == len(tokens)
    assert answer["usage"]["completion_tokens"] == 0
    bare = complete(server, [tokens, tokens[:1]], max_tokens=0)
    assert texts(bare) == ["", ""]
    assert bare["usage"]["prompt_tokens"] == len(tokens) + 1


def test_a_prompt_as_long_as_the_context_is_scored(server):
    asked = {"max_tokens": 0, "echo": True, "logprobs": 0}
    whole = complete(server, [5] * 2048, **asked)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(whole) == 2048
    assert refused(server, "/v1/completions", prompt=[5] * 2049, **asked) == "prompt"
    assert refused(server, "/v1/completions", prompt=[5] * 2048, max_tokens=1) == "prompt"


def test_prompt_logprobs_are_those_of_an_echo(server):
    asked = {"max_tokens": 2, "n": 2, "logprobs": 2}
    echoed = complete(server, "The quick", echo=True, **asked)["choices"][0]["logprobs"]["token_logprobs"]
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "The quick"}).json["tokens"]
    for choice in complete(server, "The quick", prompt_logprobs=2, **asked)["choices"]:
        scores = choice["prompt_logprobs"]
        assert scores[0] is None
        own = [score[str(token)]["logprob"] for score, token in zip(scores[1:], tokens[1:], strict=True)]
        assert own == pytest.approx(echoed[1 : len(tokens)], abs=1e-4)
    chat = completed(server, "hello", "tiny", max_tokens=1, prompt_logprobs=1)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_an_echo_with_logprobs_can_be_streamed(server):
    body = {"model": "tiny", "prompt": ["The", "quick"], "echo": True, "logprobs": 1, "max_tokens": 2, "temperature": 0}
    whole = complete(server, ["The", "quick"], echo=True, logprobs=1, max_tokens=2, temperature=0)["choices"]
    answer = server.post("/v1/completions", {**body, "stream": True})
    payloads = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n\n") if line]
    parts = [check(json.loads(payload), "CompletionChunk")["choices"][0] for payload in payloads[:-1]]
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        offsets = [at for part in own if part["logprobs"] for at in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


def test_a_model_with_the_tokens_fills_in_the_middle(server):
    answer = complete(server, "ab", "filler", suffix="c", max_tokens=1, echo=True)
    assert answer["usage"]["prompt_tokens"] == 3 + 3
    assert texts(answer)[0].startswith("ab")
    assert server.model("filler")["capabilities"]["fill_in_middle"]
    assert complete(server, "ab", "filler", suffix="", max_tokens=1)["usage"]["prompt_tokens"] == 2


def test_a_model_without_the_tokens_refuses_a_suffix(server):
    assert not server.model("tiny")["capabilities"]["fill_in_middle"]
    assert refused(server, "/v1/completions", prompt="ab", suffix="c") == "suffix"


def test_several_prompts_stream_side_by_side(server):
    body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 4, "stream": True}
    answer = server.post("/v1/completions", body)
    payloads = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n\n") if line]
    assert payloads.pop() == b"[DONE]"
    chunks = [check(json.loads(payload), "CompletionChunk") for payload in payloads]
    ends = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_one_bad_prompt_of_several_refuses_all(server):
    assert refused(server, "/v1/completions", prompt=[[1], [10**9]]) == "prompt"
    eventually(lambda: server.model("tiny")["running_requests"] == 0)


def test_tokens_and_text_go_both_ways(server):
    tokens = server.post("/tokenize", {"model": "tiny", "prompt": "Hello, how are you?"})
    check(tokens.json, "Tokens")
    assert (tokens.json["count"], tokens.json["max_model_len"]) == (len(tokens.json["tokens"]), 2048)
    text = server.post("/detokenize", {"model": "tiny", "tokens": tokens.json["tokens"]}).json
    assert text == {"prompt": "Hello, how are you?"}


def test_messages_are_tokenized_as_they_would_be_answered(server):
    messages = [{"role": "user", "content": "Hello"}]
    count = server.post("/tokenize", {"model": "tiny", "messages": messages}).json["count"]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).json["usage"]["prompt_tokens"] == count


def test_a_template_is_shown(server):
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.post("/apply-template", {"model": "tiny", "messages": messages}).json
    assert answer == {"prompt": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"}


# The description


def test_the_description_and_its_page_are_served(server):
    document = server.get("/openapi.json")
    assert (document.status, document.json["openapi"]) == (200, "3.1.0")
    assert {"/v1/chat/completions", "/v1/completions"} <= document.json["paths"].keys()
    page = server.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert b"/v1/completions" in page.body


def test_what_get_answers_is_of_its_published_shape(server):
    check(server.get("/v1/models").json, "ModelList")
    card = check(server.model("tiny"), "Model")
    assert card["max_model_len"] == card["meta"]["n_ctx_train"] == card["context_length"] == 2048
    check(server.get("/health").json, "Health")
    check(server.chat("missing", "x").json, "Error")


# Settings


def test_unknown_parameters_are_ignored_where_that_is_set(scripted_path):
    flags = ("--no-defaults", "--model", f"talker={scripted_path}", "--unknown-parameters", "ignore")
    with running_server(*flags) as server:
        answer = server.chat("talker", "hello", **{"best_of": 1, "we ird\n": 2})
        assert texts(answer.json) == [HELLO]
        assert answer.headers["x-ignored-parameters"] == "best_of, we%20ird%0A"
        with server.stream("talker", "hello", foo=1) as stream:
            assert stream.response.headers["x-ignored-parameters"] == "foo"
        assert server.chat("talker", "hello").headers["x-ignored-parameters"] is None
        assert "ignored unknown parameters: foo" in server.stop().stderr


def test_reasoning_goes_where_the_server_is_set_to(tmp_path, scripted_path):
    config = tmp_path / "models.toml"
    config.write_text(f'reasoning_format = "reasoning"\n[models.m]\nsource = "{scripted_path}"\ntype = "thinking"\n')
    with running_server("--no-defaults", "--config", str(config)) as server:
        assert "reasoning" in server.chat("m", "think").message
