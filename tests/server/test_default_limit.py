"""Limit of answers whose request states none: the same in every dialect, live, and weaker than a stated one."""

import json

import pytest

from tools.harness.running_server import DEFAULT_LIMIT, running_server

DEFAULT, CONTEXT = 24, 200
ASK = [{"role": "user", "content": "forever"}]
CHAT, RESPONSES, MESSAGES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"
BODIES = {
    CHAT: {"messages": ASK},
    RESPONSES: {"input": "forever"},
    MESSAGES: {"messages": ASK},
    OLLAMA: {"messages": ASK, "stream": False},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "models.toml"


@pytest.fixture(scope="module")
def server(config, scripted_path):
    """A model that ends no answer by itself."""
    config.write_text(
        f"default_max_tokens = {DEFAULT}\n"
        f'[models.m]\nsource = "{scripted_path}"\ntype = "instruction"\ncontext_length = {CONTEXT}\npreload = true\n'
    )
    with running_server("--no-defaults", "--config", str(config), variables={DEFAULT_LIMIT: None}) as server:
        yield server


def answer(server, path, **fields):
    """Tokens of the answer, and why it ended."""
    given = server.post(path, {"model": "m", **BODIES[path], **fields})
    assert given.status == 200, given.body
    body = given.json
    match path:
        case "/v1/responses":
            reason = body["incomplete_details"]["reason"]
            return body["usage"]["output_tokens"], reason
        case "/v1/messages":
            return body["usage"]["output_tokens"], body["stop_reason"]
        case "/api/chat":
            return body["eval_count"], body["done_reason"]
    return body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [(CHAT, "length"), (RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens"), (OLLAMA, "length")],
)
def test_an_answer_without_a_stated_limit_ends_at_the_servers(server, path, reason):
    assert answer(server, path) == (DEFAULT, reason)


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (CHAT, {"max_tokens": 40}),
        (CHAT, {"max_completion_tokens": 40}),
        (RESPONSES, {"max_output_tokens": 40}),
        (MESSAGES, {"max_tokens": 40}),
        (OLLAMA, {"options": {"num_predict": 40}}),
    ],
)
def test_a_stated_limit_wins(server, path, limit):
    assert answer(server, path, **limit)[0] == 40


@pytest.mark.parametrize(
    ("path", "limit", "reason"),
    [
        (CHAT, {"max_tokens": -1}, "length"),
        (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens"),
        (MESSAGES, {"max_tokens": -1}, "model_context_window_exceeded"),
        (OLLAMA, {"options": {"num_predict": -1}}, "length"),
    ],
)
def test_no_limit_goes_to_the_end_of_the_context(server, path, limit, reason):
    tokens, ended = answer(server, path, **limit)
    assert (tokens > 100, ended) == (True, reason)


def test_a_lower_limit_of_tokens_lifts_the_default(server):
    assert answer(server, CHAT, min_tokens=DEFAULT + 5) == (DEFAULT + 5, "length")


def test_bare_completions_keep_their_own_default(server):
    given = server.post("/v1/completions", {"model": "m", "prompt": "forever", "ignore_eos": True})
    assert given.json["usage"]["completion_tokens"] == 16


def test_a_response_shows_no_limit_that_was_not_stated(server):
    for stated, shown in ((None, None), (-1, None), (30, 30)):
        given = server.post(RESPONSES, {"model": "m", "input": "forever", "max_output_tokens": stated})
        assert json.loads(given.body)["max_output_tokens"] == shown


def test_a_reload_changes_the_limit_and_0_takes_it_away(server, config):
    before = config.read_text()
    for setting, expected in ((f"{DEFAULT + 6}", lambda n: n == DEFAULT + 6), ("0", lambda n: n > 100)):
        config.write_text(before.replace(f"= {DEFAULT}\n", f"= {setting}\n", 1))
        assert server.post("/v1/models/reload", {}).json["restart_needed"] == []
        assert expected(answer(server, CHAT)[0])
    config.write_text(before)
    server.post("/v1/models/reload", {})
