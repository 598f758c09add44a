"""Pulls and searches by a running server, from a stand-in for the hub."""

import json
import math
import threading
import time

import ollama
import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from tests.support.hub import LARGE, digest, hub_of
from tests.support.published import check
from tests.support.scripts import SCRIPTS
from tools.harness.running_server import eventually, running_server

USER, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"
HELLO = {"role": "user", "content": "hello"}
REPOSITORIES = (
    "org/streamed",
    "org/whole",
    "org/twice",
    "org/left",
    "org/listed",
    "org/followed",
    "org/wrong",
    "org/ollama",
    "org/typed",
    "org/shown",
)


@pytest.fixture(scope="module")
def hub(scripted_path):
    files = {file.name: file.read_bytes() for file in scripted_path.iterdir()}
    weights = max(files, key=lambda name: len(files[name]))
    with hub_of(files | {"padding.jsonl": b" " * 400_000 + b"\n"}) as server:
        server.repositories = {*REPOSITORIES}
        server.weights = weights
        server.listed = [{"id": "org/streamed", "downloads": 5, "likes": 1}]
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("home") / "hub"


@pytest.fixture(scope="module")
def server(hub, cache):
    variables = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(cache), "HOME": str(cache.parent)}
    flags = ("--no-defaults", "--api-key", USER, "--admin-key", ADMIN, "--heartbeat-interval", "0.2")
    with running_server(*flags, variables=variables | {"MLX_SERVER_LIBRARY": "true"}) as server:
        yield server


@pytest.fixture(autouse=True)
def undisturbed(hub):
    hub.delay, hub.answers = 0.0, []
    hub.asked.clear()


def ask(server, method, path, key=ADMIN, **body):
    headers = {"Authorization": f"Bearer {key}"}
    return server.ask(method, path, json.dumps(body).encode() if body else None, headers)


def pull(server, model, key=ADMIN, **body):
    return ask(server, "POST", "/v1/models/pull", key, model=model, **body)


def steps(answer):
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer.body
    lines = (line for line in answer.body.splitlines() if line.startswith(b"data: "))
    return [check(json.loads(line.removeprefix(b"data: ")), "PullStep") for line in lines]


def snapshots(cache, model):
    return [*(cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*")]


class Begun:
    """A streamed pull that has begun; leave() hangs up."""

    def __init__(self, server, model):
        self.server, self.id = server, f"pull of {model}".replace(" ", "-")
        self.connection = server.connect()
        body = json.dumps({"model": model, "stream": True})
        headers = {"Authorization": f"Bearer {ADMIN}", "X-Request-Id": self.id}
        self.connection.request("POST", "/v1/models/pull", body, headers)
        self.response = self.connection.getresponse()
        assert b"planned" in self.response.readline()

    def leave(self):
        self.response.close()
        self.connection.close()

    @property
    def is_over(self):
        """Whether the server has logged that the request has ended."""
        self.server.stderr.seek(0)
        return f"id={self.id} " in self.server.stderr.read()


def test_a_streamed_pull_has_its_plan_its_progress_and_its_end(server, hub):
    hub.delay = 0.01
    seen = steps(pull(server, "org/streamed", stream=True))
    assert seen[0]["event"] == "planned" and seen[0]["fits"] and seen[0]["download_bytes"] > 400_000
    assert {step["event"] for step in seen[1:-1]} == {"progress"}
    assert {step["stage"] for step in seen[1:-1]} == {"downloading"}
    assert seen[-1] == {**seen[0], "event": "pulled", "path": seen[-1]["path"]}
    listed = {each["id"]: each for each in ask(server, "GET", "/v1/library").json["data"]}
    assert listed["org/streamed"]["error"] is None
    answer = ask(server, "POST", "/v1/chat/completions", USER, model="streamed", messages=[HELLO])
    assert answer.message["content"] == SCRIPTS["hello"]


def test_a_pull_without_a_stream_is_one_object(server):
    first = check(pull(server, "https://huggingface.co/org/whole").json, "Pulled")
    assert (first["event"], first["model"], first["download_bytes"] > 0) == ("pulled", "org/whole", True)
    assert check(pull(server, "org/whole").json, "Pulled") == {**first, "download_bytes": 0}


def test_a_pull_asks_once_which_files_there_are(server, hub):
    hub.asked.clear()
    pull(server, "org/listed")
    assert [path for method, path, _ in hub.asked if path.startswith("/api/models/")] == ["/api/models/org/listed"]


def test_two_pulls_of_the_same_are_one(server, hub):
    hub.delay = 0.02
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(pull(server, "org/twice"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200, 200]
    assert len([path for method, path, _ in hub.asked if "padding" in path and method == "GET"]) == 1


def _grows(folder):
    """Whether files in a folder become longer within some of the hub's pauses."""
    before = _sizes(folder)
    time.sleep(0.5)
    return _sizes(folder) != before


def _sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_a_client_that_hangs_up_stops_its_pull_and_the_next_one_goes_on(server, hub, cache):
    hub.most = hub.sent + 100_000
    begun = Begun(server, "org/left")
    blobs = cache / "models--org--left" / "blobs"
    held = [blobs / f"{digest(name, body)}.incomplete" for name, body in hub.files.items() if len(body) > LARGE]
    eventually(lambda: any(path.exists() and path.stat().st_size for path in held))  # small ones may be whole soon
    begun.leave()
    eventually(lambda: begun.is_over)
    hub.delay = 0.1  # a download that is to end does so when it is sent something
    hub.most = math.inf
    eventually(lambda: not _grows(blobs))
    hub.delay = 0.0
    assert snapshots(cache, "org/left") == []
    assert [*blobs.glob("*.incomplete")]
    listed = {each["id"]: each for each in ask(server, "GET", "/v1/library").json["data"]}
    assert "was not downloaded to its end" in listed["org/left"]["error"]
    hub.asked.clear()
    assert pull(server, "org/left").status == 200
    assert any(asked for *_, asked in hub.asked)
    assert len(snapshots(cache, "org/left")) == 1


def test_a_pull_that_another_request_follows_goes_on(server, hub):
    hub.delay = 0.05
    begun, follower = Begun(server, "org/followed"), Begun(server, "org/followed")
    begun.leave()
    assert b'"event":"pulled"' in follower.response.read()
    follower.leave()


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("org/missing", 400, "invalid_source"),
        ("org/gated", 400, "invalid_source"),
        ("embedded:smollm2", 400, "invalid_source"),
        ("/etc", 400, "invalid_source"),
        ("x" * 200, 400, "invalid_source"),
        ("org/busy", 502, "hub_unavailable"),
    ],
)
def test_what_can_not_be_pulled_has_its_status(server, model, status, code):
    answer = pull(server, model)
    assert (answer.status, answer.error["code"]) == (status, code)


def test_a_streamed_pull_that_fails_before_its_first_event_has_its_status(server):
    assert pull(server, "x" * 200, stream=True).status == 400


def test_a_streamed_pull_that_fails_later_ends_in_an_error(server, hub):
    hub.wrong = 100
    last = pull(server, "org/wrong", stream=True).body.splitlines()[-2]
    hub.wrong = 0
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["code"], "wrong digest twice" in error["message"]) == ("hub_unavailable", True)


def test_only_an_admin_pulls_searches_and_removes(server):
    assert pull(server, "org/whole", USER).error["code"] == "admin_key_needed"
    assert ask(server, "GET", "/v1/library/search?q=tiny", USER).status == 403
    assert ask(server, "DELETE", "/v1/models/whole", USER).status == 403


def test_paths_of_the_servers_machine_are_for_admins(server, cache):
    pull(server, "org/shown")
    assert ask(server, "POST", "/v1/chat/completions", USER, model="shown", messages=[HELLO]).status == 200
    paths = ("/v1/library", "/v1/models", "/v1/models/org/shown")
    assert all(str(cache) in ask(server, "GET", path).body.decode() for path in paths)
    assert not [path for path in paths if str(cache) in ask(server, "GET", path, USER).body.decode()]
    assert ask(server, "POST", "/api/show", model="org/shown").json["modelfile"].startswith(f"FROM {cache}")
    assert str(cache) not in ask(server, "POST", "/api/show", USER, model="org/shown").body.decode()
    listed = {each["id"]: each for each in check(ask(server, "GET", "/v1/library", USER).json, "Library")["data"]}
    assert (listed["org/shown"]["path"], listed["org/shown"]["place"]) == (None, "huggingface")
    ask(server, "POST", "/v1/models/unload", key="org/shown", forget=True)


def test_models_of_the_hub_are_found(server):
    (found,) = check(ask(server, "GET", "/v1/library/search?q=stream").json, "SearchResults")["data"]
    assert (found["id"], found["downloads"], found["size_bytes"], found["fits"]) == ("org/streamed", 5, None, None)
    assert ask(server, "GET", "/v1/library/search?q=nothing").json["data"] == []
    for query, param in (("", "q"), ("?q=%20", "q"), ("?q=x&limit=0", "limit"), ("?q=x&limit=many", "limit")):
        assert ask(server, "GET", f"/v1/library/search{query}").error["param"] == param


def test_ollamas_pull_and_delete_are_the_same(server, hub, cache):
    headers = {"Authorization": f"Bearer {ADMIN}"}
    pull(server, "org/streamed")
    with ollama.Client(server.url, headers=headers) as admin:
        hub.delay = 0.02
        lines = [*admin.pull("hf.co/org/ollama", stream=True)]
        assert (lines[0].status, lines[-1].status) == ("pulling manifest", "success")
        assert any(line.digest and line.total and line.completed for line in lines)
        names = {model.model for model in admin.list().models}
        assert {"hf.co/org/ollama:latest", "org/streamed:latest"} <= names
        assert admin.show("streamed").modelinfo
        assert admin.chat("hf.co/org/ollama", [HELLO]).message.content == SCRIPTS["hello"]
        assert admin.delete("hf.co/org/ollama").status == "success"
        assert not (cache / "models--org--ollama").exists()
        with pytest.raises(ollama.ResponseError):
            admin.show("hf.co/org/ollama")


def test_the_command_line_asks_the_server(server, hub, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", ADMIN)
    assert main(["pull", "org/typed"], read_settings) == 0
    out, err = capfd.readouterr()
    assert out.strip().endswith(hub.commit)
    assert "org/typed: " in err and "to download; it needs" in err
    assert main(["pull", "org/typed", "--json"], read_settings) == 0
    assert json.loads(capfd.readouterr().out)["download_bytes"] == 0
    assert main(["pull", "org/missing"], read_settings) == 1
    assert "no such repository on the hub" in capfd.readouterr().err
    assert main(["search", "stream", "--json"], read_settings) == 0
    assert json.loads(capfd.readouterr().out)["data"][0]["id"] == "org/streamed"
    monkeypatch.setenv("OPENAI_API_KEY", USER)
    assert main(["pull", "org/typed"], read_settings) == 1
    assert "without an admin key" in capfd.readouterr().err
