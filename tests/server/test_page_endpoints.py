"""What the page asks of the server: its session, the feed of events, requests and their traces, Markdown."""

import asyncio
import json

import jsonschema
import pytest

from mlxserver.api import openapi
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.config.settings import Settings
from mlxserver.engine.events import MAX_CHUNKS, Delta
from mlxserver.engine.worker.generation import Generation
from mlxserver.server.keys import Keys, Permission
from mlxserver.server.live_response import silence
from mlxserver.server.request_history import MAX_SPANS, RequestHistory, RequestRecord, trace
from mlxserver.server.request_log import MAX_TEXT, RequestLog, note_dialect, note_events, note_prompt
from tools.harness.running_server import DEADLINE, chat_body, eventually, running_server

USER, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"
PAGE = {"Accept": "text/html,*/*;q=0.8"}
CHAT = json.dumps(chat_body("talker", "hello"))
SCHEMAS = openapi.document(ENDPOINTS, "", "")


@pytest.fixture(scope="module")
def server(scripted_path, tmp_path_factory):
    settings = tmp_path_factory.mktemp("settings") / "models.toml"
    settings.write_text(f'no_defaults = true\n[models.talker]\nsource = "{scripted_path}"\n')
    keys = ("--api-key", USER, "--admin-key", ADMIN)
    with running_server("--config", str(settings), *keys, "--log-level", "debug") as server:
        server.settings = settings
        yield server
        ended = server.stop()
        assert not [key for key in (USER, ADMIN, "session.") if key in ended.stderr]


def sign_in(server, key):
    """The cookie of a session."""
    answer = server.post("/page/session", {"key": key})
    assert answer.status == 200
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and key not in cookie
    return cookie.partition(";")[0]


def as_admin(server, method, path, body=None):
    return server.ask(method, path, body, {"x-api-key": ADMIN})


def check(answer, schema):
    assert answer.status == 200, answer.body
    jsonschema.validate(answer.json, {"$ref": f"#/components/schemas/{schema}", **SCHEMAS})
    return answer.json


def ended(server, id):
    """What is listed of a request with an id of its own, once it has ended: its answer may come before."""

    def found():
        listed = check(as_admin(server, "GET", "/v1/requests"), "RequestList")["data"]
        return next(
            (each for each in listed if each["id"] == id and each["outcome"] not in ("running", "waiting")), None
        )

    return eventually(found)


class Feed:
    """Reader of GET /v1/events; a context manager, which hangs up."""

    def __init__(self, server):
        self.connection = server.connect()

    def __enter__(self):
        self.connection.request("GET", "/v1/events", headers={"x-api-key": USER})
        self.response = self.connection.getresponse()
        return self

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()

    def __iter__(self):
        while line := self.response.readline():
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


# The page and its session


def test_the_page_needs_no_key_and_tells_nothing(server):
    answer = server.ask("GET", "/", headers=PAGE)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert b"talker" not in answer.body and b"<script>" not in answer.body and b"style=" not in answer.body
    assert server.get("/page/app.js").status == 200
    assert server.get("/").status == 401
    assert server.get("/page/keys.js").status == 401
    assert server.ask("POST", "/page/app.js").status == 401
    state = check(server.get("/page/session"), "Session")
    assert state == {"needs_key": True, "may_generate": False, "may_manage": False}


def test_a_session_has_the_rights_of_its_key(server):
    user, admin = sign_in(server, USER), sign_in(server, ADMIN)
    for cookie, may_manage in ((user, False), (admin, True)):
        state = check(server.ask("GET", "/page/session", headers={"Cookie": cookie}), "Session")
        assert state == {"needs_key": True, "may_generate": True, "may_manage": may_manage}
        headers = {"Cookie": cookie, "X-MLX-Page": "1"}
        assert server.ask("POST", "/v1/chat/completions", CHAT, headers).status == 200
        pinned = server.ask("POST", "/v1/models/pin", '{"key": "talker", "pin": false}', headers)
        assert pinned.status == (200 if may_manage else 403)
    assert server.post("/page/session", {"key": "sk-wrong-0123456789"}).status == 401
    assert server.post("/page/session", {"key": "x" * 10_000}).status == 413  # nothing long is read without a key
    ended = server.ask("DELETE", "/page/session", headers={"Cookie": user, "X-MLX-Page": "1"})
    assert 'mlx_session=""' in ended.headers["set-cookie"]
    left = check(ended, "Session")
    assert (left["needs_key"], left["may_generate"], left["may_manage"]) == (True, False, False)


def test_a_cookie_counts_in_requests_of_the_page_alone(server):
    cookie = {"Cookie": sign_in(server, ADMIN)}
    assert server.ask("GET", "/v1/models", headers=cookie).status == 200
    assert server.ask("GET", "/v1/models", headers=cookie | {"Sec-Fetch-Site": "same-origin"}).status == 200
    for site in ("same-site", "cross-site"):
        assert server.ask("GET", "/v1/models", headers=cookie | {"Sec-Fetch-Site": site}).status == 401
    for method, path, body in (
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/models/unload", '{"key": "talker"}'),
        ("DELETE", "/v1/models/talker", None),
    ):
        assert server.ask(method, path, body, cookie).status == 401
        foreign = cookie | {"Origin": "https://evil.example", "X-MLX-Page": "1"}
        assert server.ask(method, path, body, foreign).status == 403


def test_a_changed_or_expired_session_opens_nothing():
    keys = Keys(Settings(api_key=(USER,), admin_key=(ADMIN,)), "127.0.0.1")
    _, client = keys.identify(b"", ADMIN.encode())
    token = keys.session(client).encode()
    assert keys.identify_session(token) == (Permission.NAME_FILES, client)
    assert keys.identify(b"Bearer " + token) == (Permission.NAME_FILES, client)
    name, expiry, signature = token.split(b".")
    later = str(int(expiry) + 1).encode()
    for wrong in (
        b".".join((name, later, signature)),
        b".".join((name, expiry, signature[:-1] + b"x")),
        b".".join((b"other", expiry, signature)),
        b".".join((name, b"9" * 30, signature)),
        b".".join((name, "\u00b2".encode("latin-1"), signature)),
        b"session..",
        b"session",
        keys.session(client, -1).encode(),
    ):
        assert keys.identify_session(wrong) == (None, ""), wrong
    assert Keys(Settings(admin_key=(ADMIN + "x",)), "127.0.0.1").identify_session(token) == (None, "")
    assert keys.session("") == ""


# The feed of events


def test_events_are_a_snapshot_then_what_changes(server):
    as_admin(server, "POST", "/v1/models/unload", '{"key": "talker"}')
    with Feed(server) as feed:
        events = iter(feed)
        first = next(events)
        assert (first["event"], first["models"][0]["id"], first["models"][0]["status"]) == (
            "snapshot",
            "talker",
            {"value": "unloaded"},
        )
        memory = first["memory"]
        parts = ("weights", "kv_cache", "reserved", "prefixes", "other", "free")
        assert sum(memory[part] for part in parts) == memory["budget"]
        assert server.ask("POST", "/v1/chat/completions", CHAT, {"x-api-key": USER}).status == 200
        changed = [next(event for event in events if event.get("models"))]
        while changed[-1]["models"][0]["status"]["value"] != "loaded":
            changed.append(next(event for event in events if event.get("models")))
        assert {event["event"] for event in changed} == {"changes"}
        for figure in ("ttft_seconds", "tokens_per_second"):
            while not any(event["models"][0][figure] for event in changed):
                changed.append(next(event for event in events if event.get("models")))


def test_readers_of_events_need_a_key_and_leave_without_a_trace(server):
    assert server.get("/v1/events").status == 401
    for _ in range(5):
        with Feed(server) as feed:
            assert next(iter(feed))["event"] == "snapshot"
    assert server.ask("GET", "/health").status == 200


def test_a_reader_of_events_gets_a_sign_of_life_whatever_other_streams_get():
    """A page that reads nothing for twenty seconds takes the connection for a lost one."""
    assert [silence(setting) for setting in (5, 0, 60)] == [5, 10, 10]


def test_the_last_event_says_that_the_server_stops(scripted_path):
    with running_server("--no-defaults", "--model", f"talker={scripted_path}", "--api-key", USER) as server:
        with Feed(server) as feed:
            events = iter(feed)
            next(events)
            server.process.terminate()
            assert [event["event"] for event in events][-1] == "stopping"
        assert server.process.wait(DEADLINE) == 0


# Requests


def test_requests_are_listed_with_their_figures_and_traced(server):
    headers = {"x-api-key": USER, "User-Agent": "tester/1.0", "X-Request-Id": "one"}
    assert server.ask("POST", "/v1/chat/completions", CHAT, headers).status == 200
    wrong = json.dumps(chat_body("talker", "hello", temperature=9))
    assert server.ask("POST", "/v1/chat/completions", wrong, headers | {"X-Request-Id": "two"}).status == 400
    one, two = ended(server, "one"), ended(server, "two")
    assert check(as_admin(server, "GET", "/v1/requests"), "RequestList")["data"][:2] == [two, one]
    assert (one["model"], one["dialect"], one["client"]) == ("talker", "openai", "tester/1.0")
    assert (one["status"], one["outcome"], one["error"]) == (200, "stop", None)
    assert one["completion_tokens"] > 0 and one["key"] and len(one["key"]) == 8
    assert 0 < one["ttft_seconds"] <= one["seconds"]
    assert (two["status"], two["outcome"]) == (400, "error")
    assert "temperature" in two["error"]
    found = check(as_admin(server, "GET", "/v1/requests/one"), "RequestTrace")
    names = [span["name"] for span in found["spans"]]
    assert names[0] == "read" and names[-1] == "decode" and "prefill" in names
    assert all(a["start"] <= a["end"] <= found["seconds"] + 1e-3 for a in found["spans"])
    assert (found["prompt"], found["answer"]) == (None, None)
    assert server.ask("GET", "/v1/requests", headers={"x-api-key": USER}).status == 403
    unknown = as_admin(server, "GET", "/v1/requests/none")
    assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")


@pytest.mark.parametrize(
    ("body", "status", "model", "error"),
    [
        ({"model": "no<b>body</b>"}, 404, "no<b>body</b>", "no<b>body</b>"),
        ({"model": "talker", "stream": "yes"}, 400, "talker", "'stream'"),
        ({"model": "two\nlines \u202eback"}, 404, "'two\\nlines \\u202eback'", "two"),
        ({"model": "m" * 100_000}, 404, "m" * 120, "m"),
        ({"model": ["a"]}, 400, "a list", "'model'"),
        ({"model": 5}, 400, "5", "'model'"),
        ({"model": "talker", "messages": "none"}, 400, "talker", "'messages'"),
        ({}, 400, None, "'model'"),
        (b"[1]", 400, None, "refused"),
        (b"{", 400, None, "refused"),
        (b'{"model": "talker", "messages": [' + b"[]," * 200_000 + b"[]]}", 400, None, "refused"),
    ],
)
def test_a_refused_request_is_listed_with_what_it_named_as_its_model(server, body, status, model, error):
    headers = {"x-api-key": USER, "User-Agent": "tester/2.0", "X-Request-Id": "refused"}
    if isinstance(body, dict):
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], **body})
    for path, dialect in (("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic"), ("/api/chat", "ollama")):
        assert server.ask("POST", path, body, headers).status == status
        found = as_admin(server, "GET", "/v1/requests").json["data"][0]
        assert (found["id"], found["path"], found["dialect"], found["client"]) == (
            "refused",
            path,
            dialect,
            "tester/2.0",
        )
        assert (found["status"], found["outcome"], found["model"]) == (status, "error", model)
        assert error in found["error"] and len(found["error"]) < 1000


def test_a_request_for_a_model_that_can_not_be_loaded_is_listed_with_it(server, scripted_path, tmp_path):
    for file in scripted_path.iterdir():
        (tmp_path / file.name).write_bytes(b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
    before = server.settings.read_text()
    try:
        server.settings.write_text(f'{before}\n[models.broken]\nsource = "{tmp_path}"\n')
        assert as_admin(server, "POST", "/v1/models/reload").status == 200
        body, headers = json.dumps(chat_body("broken", "hello")), {"x-api-key": USER, "X-Request-Id": "broken"}
        assert server.ask("POST", "/v1/chat/completions", body, headers).status == 503
        found = ended(server, "broken")
        assert (found["model"], found["outcome"], found["status"]) == ("broken", "error", 503)
    finally:
        server.settings.write_text(before)
        assert as_admin(server, "POST", "/v1/models/reload").status == 200


def test_a_reader_of_requests_gets_what_is_new_by_its_cursor(server):
    def ask(id):
        headers = {"x-api-key": USER, "X-Request-Id": id}
        assert server.ask("POST", "/v1/chat/completions", CHAT, headers).status == 200
        ended(server, id)

    def listed(cursor):
        return check(as_admin(server, "GET", f"/v1/requests?after={cursor}"), "RequestList")

    ask("first")
    whole = listed("")
    assert whole["is_whole"] and whole["data"][0]["id"] == "first"
    assert listed(whole["cursor"])["data"] == []
    ask("second")
    news = listed(whole["cursor"])
    assert ([each["id"] for each in news["data"]], news["is_whole"]) == (["second"], False)
    process, _, number = news["cursor"].partition(".")
    for unknown in (
        f"00000000.{number}",
        f"{process}.{int(number) + 1}",
        f"{process}.{'9' * 5000}",
        process,
        "-1",
        "a.b",
    ):
        found = listed(unknown)
        assert (found["is_whole"], found["cursor"], len(found["data"])) == (
            True,
            news["cursor"],
            len(whole["data"]) + 1,
        )


def test_a_reader_that_missed_more_requests_than_are_kept_gets_all_that_are():
    history = RequestHistory(most=2)

    def end(id):
        record = RequestRecord(id, "POST", "/v1/completions", dialect="openai")
        history.begin(record)
        history.end(record)

    end("a")
    cursor = history.summaries().cursor
    for id in ("b", "c"):
        end(id)
    found = history.summaries(cursor)
    assert ({each["id"] for each in found.requests}, found.is_whole) == ({"b", "c"}, False)
    end("d")
    found = history.summaries(cursor)
    assert ({each["id"] for each in found.requests}, found.is_whole) == ({"c", "d"}, True)


def test_an_error_is_kept_without_what_it_quotes_of_the_request(server):
    headers = {"x-api-key": USER, "X-Request-Id": "a/bc"}
    secret = json.dumps({**chat_body("talker", "hello"), "tool_choice": "a secret word"})
    answer = server.ask("POST", "/v1/chat/completions", secret, headers)
    assert answer.status == 400 and "a secret word" in answer.error["message"]
    for path in ("/v1/requests/a/bc", "/v1/requests/a%2Fbc"):  # an id may have slashes
        found = check(as_admin(server, "GET", path), "RequestTrace")
        assert (found["id"], found["error"]) == ("a/bc", "The request was refused for its 'tool_choice'.")


def test_a_running_request_is_listed_and_one_that_is_cut_off_is_cancelled(server):
    connection = server.connect()
    body = json.dumps(chat_body("talker", "forever", stream=True))
    connection.request("POST", "/v1/chat/completions", body, {"x-api-key": USER, "X-Request-Id": "endless"})
    response = connection.getresponse()
    response.read(100)
    assert check(as_admin(server, "GET", "/v1/requests/endless"), "RequestTrace")["outcome"] == "running"
    response.close()
    connection.close()
    eventually(lambda: as_admin(server, "GET", "/v1/requests/endless").json["outcome"] == "cancelled")


def test_texts_are_kept_only_while_the_setting_asks_for_it(server):
    before = server.settings.read_text()
    try:
        server.settings.write_text("log_contents = true\npage = false\n" + before)
        assert as_admin(server, "POST", "/v1/models/reload").status == 200
        headers = {"x-api-key": USER, "X-Request-Id": "kept"}
        assert server.ask("POST", "/v1/chat/completions", CHAT, headers).status == 200
        found = as_admin(server, "GET", "/v1/requests/kept").json
        assert json.loads(found["prompt"])["messages"] == [{"role": "user", "content": "hello"}]
        assert found["answer"] == "Hello there, and hello there again."
        assert server.ask("GET", "/", headers=PAGE).status == 401  # no page either
        assert as_admin(server, "GET", "/page/app.js").status == 404
        assert server.ask("GET", "/", headers=PAGE | {"x-api-key": USER}).body == b"Ollama is running"
    finally:
        server.settings.write_text(before)
        assert as_admin(server, "POST", "/v1/models/reload").status == 200


def test_texts_are_kept_up_to_their_limit():
    async def app(*_):
        note_dialect("openai")
        note_prompt(b"p" * (MAX_TEXT + 1))
        for _ in range(2):
            note_events([Delta("a" * (MAX_TEXT - 1))])

    history = RequestHistory()
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"x-request-id", b"long")]}
    asyncio.run(RequestLog(app, history)(scope, None, None))
    found = history.trace("long")
    assert (len(found["prompt"]), len(found["answer"])) == (MAX_TEXT, MAX_TEXT)


def test_a_trace_has_a_limit_of_spans():
    def generation(chunks):
        made = Generation(None, lambda _: None)
        made.prompt.chunks = [(record.started + n / 1000, n) for n in range(1, chunks + 1)]
        return made

    def names(*chunks):
        record.generations = [generation(each) for each in chunks]
        record.submitted = [record.started] * len(chunks)
        return [span["name"] for span in trace(record)["spans"]]

    record = RequestRecord("a", "POST", "/v1/completions")
    record.asked, record.ended = record.started, record.started + 60.0
    assert names(MAX_CHUNKS).count("prefill") >= MAX_CHUNKS - 1
    assert len(names(MAX_CHUNKS, MAX_CHUNKS, 1)) == MAX_SPANS


# The rest


def test_markdown_is_rendered(server):
    answer = server.ask("POST", "/v1/render", '{"texts": ["*a*", "<b>"]}', {"x-api-key": USER})
    assert check(answer, "Rendered") == {"html": ["<p><em>a</em></p>\n", "<p>&lt;b&gt;</p>\n"]}
    for body in ({"texts": "a"}, {"texts": [1]}, {"texts": ["a"] * 257}, {"texts": ["a" * 400_001]}, {}):
        assert server.ask("POST", "/v1/render", json.dumps(body), {"x-api-key": USER}).status == 400


def test_a_registered_model_is_loaded_by_its_key_whatever_its_source(server):
    as_admin(server, "POST", "/v1/models/unload", '{"key": "talker"}')
    loaded = as_admin(server, "POST", "/v1/models/load", '{"model": "talker"}')
    assert (loaded.status, loaded.json["key"], loaded.json["status"]) == (200, "talker", "loaded")


def test_a_benchmark_is_refused_for_what_it_can_not_measure(server):
    for body, status in (
        ({"models": ["nothing"]}, 404),
        ({"models": []}, 400),
        ({"models": ["talker"], "concurrency": [0]}, 400),
        ({"models": ["talker"], "kind": "interference"}, 400),
    ):
        assert as_admin(server, "POST", "/v1/benchmark", json.dumps(body)).status == status, body
