"""Authentication and authorization over real sockets: keys, host names, origins."""

import json

import pytest

from mlxserver.config.settings import Settings
from mlxserver.server.auth import hostname
from mlxserver.server.keys import Keys, Permission
from tools.harness.running_server import chat_body, running_server

USER, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"
WRONG = "sk-user-012345678"
APP = "https://app.example.org"


@pytest.fixture(scope="module")
def server(scripted_path, tmp_path_factory):
    """One server with keys from a flag and from a file; its log shows none of them."""
    keys = tmp_path_factory.mktemp("keys") / "admins"
    keys.write_text(f"# who may do everything\n\n{ADMIN}\n")
    users = keys.with_name("users")
    users.write_text("sk-another-user\n")
    access = (
        "--api-key",
        USER,
        "--api-key-file",
        str(users),
        "--admin-key-file",
        str(keys),
        "--allow-host",
        "models.example.org",
        "--allow-origin",
        APP,
    )
    with running_server(
        "--no-defaults", "--model", f"talker={scripted_path}", *access, "--log-level", "debug"
    ) as server:
        server.users = users
        yield server
        ended = server.stop()
        assert ended.status == 0
        assert not [key for key in (USER, ADMIN, WRONG) if key in ended.stderr]


def bearer(key, **headers):
    return {"Authorization": f"Bearer {key}", **headers}


CHAT = json.dumps(chat_body("talker", "hello"))
PATHS = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/talker", None),
    ("GET", "/v1/models/missing", None),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", "{nonsense"),
    ("POST", "/v1/chat/completions", "x" * 100_000),
    ("GET", "/v1/chat/completions", None),
    ("POST", "/v1/models/load", '{"model": "/etc/passwd"}'),
    ("POST", "/v1/models/unload", '{"key": "talker"}'),
    ("GET", "/metrics", None),
    ("GET", "/health/ready", None),
    ("GET", "/openapi.json", None),
    ("GET", "/no/such/path", None),
    ("GET", "/health/", None),
    ("DELETE", "/", None),
]


def test_a_wrong_or_missing_key_learns_nothing(server):
    def response(method, path, body, headers):
        answer = server.ask(method, path, body, {"X-Request-Id": "the-same", **headers})
        kept = [(name.lower(), value) for name, value in answer.headers.items() if name.lower() != "date"]
        return answer.status, kept, answer.body

    keys = [
        {},
        bearer(WRONG),
        bearer(""),
        {"Authorization": USER},
        {"Authorization": f"Basic {USER}"},
        bearer(USER + "x"),
        {"x-api-key": WRONG},
        {"x-api-key": f"Bearer {USER}"},
        {"x-api-key": ""},
    ]
    expected = response("GET", "/v1/models", None, {})
    assert expected[0] == 401
    for case in PATHS:
        for headers in keys:
            assert response(*case, headers) == expected, (case, headers)


def test_the_refusal_is_openais(server):
    answer = server.get("/v1/models")
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        401,
        "authentication_error",
        "invalid_api_key",
    )
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_needs_no_key_and_names_no_model(server):
    answer = server.get("/health")
    assert answer.status == 200
    assert b"talker" not in answer.body


def test_a_key_generates_and_lists_but_does_not_manage(server):
    assert server.ask("POST", "/v1/chat/completions", CHAT, bearer(USER)).status == 200
    assert server.ask("GET", "/v1/models", None, {"authorization": f"bearer {USER}"}).status == 200
    for method, path, body in (
        ("POST", "/v1/models/load", '{"model": "embedded:smollm2"}'),
        ("POST", "/v1/models/unload", '{"key": "talker"}'),
        ("POST", "/v1/models/reload", ""),
        ("GET", "/metrics", None),
    ):
        answer = server.ask(method, path, body, bearer(USER))
        assert (answer.status, answer.error["code"]) == (403, "admin_key_needed")


def test_a_key_may_come_in_a_header_of_its_own(server):
    """Some clients send x-api-key alone, others both headers with a key in one of them."""
    for headers in (
        {"x-api-key": USER},
        {"x-api-key": USER, "Authorization": "Bearer none"},
        bearer(USER, **{"x-api-key": "-"}),
    ):
        assert server.ask("POST", "/v1/chat/completions", CHAT, headers).status == 200
        assert server.ask("GET", "/metrics", None, headers).status == 403
    assert server.ask("GET", "/metrics", None, {"x-api-key": ADMIN}).status == 200


def test_an_admin_key_does_everything(server, scripted_path):
    load = json.dumps({"model": str(scripted_path), "key": "copy"})
    assert server.ask("POST", "/v1/models/load", load, bearer(ADMIN)).status == 200
    assert server.ask("POST", "/v1/chat/completions", CHAT.replace("talker", "copy"), bearer(ADMIN)).status == 200
    assert server.ask("POST", "/v1/models/unload", '{"key": "copy", "forget": true}', bearer(ADMIN)).status == 200
    assert server.ask("GET", "/metrics", None, bearer(ADMIN)).status == 200


def test_keys_are_changed_without_a_restart(server):
    for key, rest in (("sk-another-user", "sk-the-next-user"), ("sk-the-next-user", "sk-another-user")):
        assert server.ask("GET", "/v1/models", None, bearer(key)).status == 200
        server.users.write_text(rest)
        reloaded = server.ask("POST", "/v1/models/reload", "", bearer(ADMIN))
        assert (reloaded.status, reloaded.json["restart_needed"]) == (200, [])
        assert server.ask("GET", "/v1/models", None, bearer(key)).status == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST.", "models.example.org"])
def test_a_server_is_asked_by_its_names(server, host):
    assert server.ask("GET", "/v1/models", None, bearer(USER, Host=host)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "0.0.0.0"]
)
def test_another_name_is_refused_whatever_the_key(server, host):
    for path in ("/v1/models", "/health", "/nowhere"):
        answer = server.ask("GET", path, None, bearer(ADMIN, Host=host))
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


def test_pages_of_an_allowed_origin_may_ask_and_read(server):
    asked = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = server.ask("OPTIONS", "/v1/chat/completions", None, asked)
    assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, APP)
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    answer = server.ask("POST", "/v1/chat/completions", CHAT, bearer(USER, Origin=APP))
    assert (answer.status, answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (
        200,
        APP,
        "Origin",
    )
    assert server.ask("GET", "/v1/models", None, {"Origin": APP}).headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://app.example.org", f"{APP}:8443", "http://["]
)
def test_pages_of_other_origins_may_not_even_ask(server, origin):
    for method in ("POST", "OPTIONS"):
        headers = bearer(ADMIN, Origin=origin) | {"Access-Control-Request-Method": "POST"}
        answer = server.ask(method, "/v1/models/unload", '{"key": "talker"}', headers)
        assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_may_ask(server):
    own = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert server.ask("GET", "/v1/models", None, bearer(USER, **own)).status == 200


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("a", "a"),
        ("A.b.:80", "a.b"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("", ""),
        (":", ""),
        ("[", ""),
    ],
)
def test_the_name_in_a_host_header(header, name):
    assert hostname(header) == name


def test_without_keys_this_machine_may_name_files_and_others_may_not():
    assert Keys(Settings(), "127.0.0.1").permission(b"") is Permission.NAME_FILES
    assert Keys(Settings(), "localhost").permission(b"Bearer x") is Permission.NAME_FILES
    assert Keys(Settings(), "0.0.0.0").permission(b"") is Permission.MANAGE


def test_with_an_admin_key_alone_generating_needs_it():
    keys = Keys(Settings(admin_key=(ADMIN,)), "127.0.0.1")
    assert keys.permission(b"") is None
    assert keys.permission(f"Bearer {ADMIN}".encode()) is Permission.NAME_FILES


def test_an_address_that_others_reach_gives_a_warning_without_keys(scripted_path):
    flags = ("--no-defaults", "--host", "0.0.0.0", "--model", f"talker={scripted_path}")
    with running_server(*flags) as server:
        load = server.post("/v1/models/load", {"model": str(scripted_path), "key": "copy"})
        assert (load.status, load.error["code"]) == (403, "admin_key_needed")
        assert server.ask("GET", "/v1/models", None, {"Host": "any.example"}).status == 200
        assert "no keys (--api-key)" in server.stop().stderr


def test_a_client_is_known_by_its_key():
    """Whichever header has it; without keys all clients are one."""
    keys = Keys(Settings(api_key=(USER,), admin_key=(ADMIN,)), "127.0.0.1")
    user, admin = (keys.identify(f"Bearer {key}".encode()) for key in (USER, ADMIN))
    assert (user[0], admin[0]) == (Permission.GENERATE, Permission.NAME_FILES)
    assert user[1] != admin[1] and USER not in user[1]
    assert keys.identify(b"", USER.encode()) == user
    assert keys.identify(f"Bearer {USER}".encode(), ADMIN.encode()) == admin
    assert keys.identify(b"Bearer x") == (None, "")
    assert Keys(Settings(), "127.0.0.1").identify(b"Bearer x")[1] == ""
