"""Models are loaded and unloaded over HTTP; the responses, the metrics and the log report it."""

import json
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_api_server import DEFAULT_MODELS
from mlxserver.config.fields import settings_of
from mlxserver.config.load import MODEL_FIELDS, build
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import POLICY_FIELDS, ModelSpec, Settings
from mlxserver.engine.loading import estimate
from tests.support.scripts import SCRIPTS
from tools.harness.running_server import ROOT, eventually, run_server, running_server

HELLO = SCRIPTS["hello"]


def written(path, text):
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def one(scripted_path):
    """Bytes that one scripted model is expected to take."""
    return estimate.estimate(ModelSpec("a", str(scripted_path))).total


@pytest.fixture(scope="module")
def server(scripted_path, one, tmp_path_factory):
    """A server whose memory holds two of its models, and whose log is JSON."""
    lines = [f"memory_limit = {int(one * 2.5)}", 'log_format = "json"', "min_residency = 0.0"]
    for key in "abc":
        lines += [f"[models.{key}]", f'source = "{scripted_path}"', f'aliases = ["{key * 2}"]']
    path = written(tmp_path_factory.mktemp("config") / "models.toml", "\n".join(lines))
    faults = tmp_path_factory.mktemp("faults")
    script = {"script": "tests/support/faulty_server.py", "variables": {"FAULTS": str(faults)}}
    with running_server("--no-defaults", "--config", str(path), **script) as server:
        server.config, server.faults = path, faults
        yield server


@pytest.fixture(autouse=True)
def nothing_loaded(request):
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for model in server.get("/v1/models").json["data"]:
            server.post("/v1/models/unload", {"key": model["id"], "mode": "abort"})


def events(answer):
    return [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]


def metrics(server):
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def logged(server):
    server.stderr.seek(0)
    whole, _, _ = server.stderr.read().rpartition("\n")  # the last one may be on its way
    return [json.loads(line) for line in whole.splitlines()]


def test_a_load_can_stream_its_progress(server, scripted_path):
    answer = server.post("/v1/models/load", {"model": str(scripted_path), "key": "a", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *reports, last = events(answer)
    assert {report["event"] for report in reports} == {"progress"}
    assert (last["event"], last["key"], last["status"]) == ("loaded", "a", "loaded")
    assert last["memory_bytes"] == last["estimate"]["weights"] > 0


def test_a_streamed_load_that_can_not_even_begin_has_its_status(server):
    answer = server.post("/v1/models/load", {"model": "/nowhere", "key": "a", "stream": True})
    assert (answer.status, answer.error["code"]) == (400, "invalid_source")


def test_what_does_not_fit_is_507_with_a_projection(server, scripted_path, one):
    with server.stream("a", "forever") as first, server.stream("b", "forever") as second:
        first.read(2), second.read(2)
        answer = server.post("/v1/models/load", {"model": str(scripted_path), "key": "c"})
    assert (answer.status, answer.json["error"]["code"]) == (507, "insufficient_memory")
    projection = answer.json["projection"]
    assert (projection["needed"], projection["busy"], projection["pinned"]) == (one, 2 * one, 0)
    assert projection["free"] == projection["budget"] - 2 * one


def test_requests_for_three_models_with_memory_for_two_are_all_answered(server):
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda key: server.chat(key, "hello"), "abc" * 6))
    assert [answer.message["content"] for answer in answers] == [HELLO] * 18


def test_a_client_that_leaves_within_its_body_is_no_fault_of_the_server(server):
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: left\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"{")
    line = eventually(lambda: next((line for line in logged(server) if line.get("id") == "left"), None))
    assert line.get("status") is None


def test_an_alias_answers_as_its_model(server):
    assert server.chat("aa", "hello").message["content"] == HELLO
    assert server.model("a")["aliases"] == ["aa"]


def test_keep_alive_zero_unloads_the_model_after_the_answer(server):
    assert server.chat("a", "hello", keep_alive=0).status == 200
    eventually(lambda: server.status("a") == "unloaded")


def test_a_load_can_set_every_field_of_a_model(server, scripted_path):
    body = {"model": str(scripted_path), "key": "new", "pin": True, "ttl": "5m", "max_running": 1, "max_waiting": 0}
    body |= {"cache_tokens": 50_000, "defaults": {"temperature": 0.5}}
    assert server.post("/v1/models/load", body).status == 200
    model = server.model("new")
    assert (model["pinned"], model["expires_in_seconds"], model["context_length"]) == (True, None, 50_000)
    with server.stream("new", "forever") as stream:
        stream.read(2)
        assert server.chat("new", "hello").status == 429
    assert server.post("/v1/models/load", body | {"model": "org/other"}).status == 409
    assert server.post("/v1/models/unload", {"key": "new", "forget": True}).status == 200
    assert server.get("/v1/models/new").status == 404


@pytest.mark.parametrize(
    ("defaults", "param"),
    [({"temperature": 3}, "defaults.temperature"), ({"seed": 1}, "defaults.seed"), ([], "defaults")],
)
def test_wrong_defaults_are_refused_by_name(server, defaults, param):
    answer = server.post("/v1/models/load", {"model": "org/name", "defaults": defaults})
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_drain_under_eight_streams_lets_all_eight_complete(server):
    def last_two(_):
        with server.stream("a", "forever", max_tokens=300) as stream:
            return list(stream)[-2:]

    hold = server.faults / "hold"
    hold.touch()  # none of them ends before the drain has begun
    with ThreadPoolExecutor(9) as pool:
        ends = pool.map(last_two, range(8))
        eventually(lambda: server.model("a")["running_requests"] == 8)
        draining = pool.submit(server.post, "/v1/models/unload", {"key": "a", "mode": "drain"})
        eventually(lambda: server.status("a") == "draining")
        hold.unlink()
        report = draining.result().json
        assert (report["completed_requests"], report["aborted_requests"]) == (8, 0)
        assert [(end["choices"][0]["finish_reason"], done) for end, done in ends] == [("length", "[DONE]")] * 8


def broken_models(scripted_path, directory):
    """Sources whose load fails, each in its own way, and a part of the error message."""

    def copy(name):
        return shutil.copytree(scripted_path, directory / name)

    (copy("missing") / "model.safetensors").unlink()
    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:3000])
    config = copy("martian") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "martian"}))
    yield {"model": str(directory / "missing")}, "No safetensors found"
    yield {"model": str(directory / "truncated")}, "can't be read"
    yield {"model": str(directory / "martian")}, "martian not supported"
    yield {"model": str(scripted_path), "adapter": str(directory)}, "can't be used with this model"
    yield {"model": "org/name"}, "Hugging Face hub"


def test_loads_that_fail_report_the_cause_and_leave_the_others_serving(server, scripted_path, tmp_path):
    with server.stream("a", "forever") as stream:
        stream.read(2)
        for body, cause in broken_models(scripted_path, tmp_path):
            answer = server.post("/v1/models/load", {**body, "key": "broken"})
            assert (answer.status, answer.error["code"]) == (503, "load_failed"), answer.body
            assert cause in answer.error["message"]
            assert server.get("/v1/models/broken").status == 404
        assert server.chat("b", "hello").message["content"] == HELLO
        stream.read(10)


def test_every_request_that_waits_for_a_load_that_fails_gets_the_cause(scripted_path, tmp_path):
    (broken := shutil.copytree(scripted_path, tmp_path / "broken")) and (broken / "tokenizer.json").unlink()
    with running_server("--no-defaults", "--model", f"x={broken}") as server, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.chat("x", "hello"), range(4)))
        assert {answer.status for answer in answers} == {503}
        assert all("the tokenizer in" in answer.error["message"] for answer in answers)


def test_new_settings_are_read_again_on_demand_and_by_a_signal(server):
    before = server.config.read_text()
    try:
        written(server.config, before + '\n[models.d]\nsource = "org/d"\n')
        assert server.post("/v1/models/reload", {}).json == {
            "added": ["d"], "removed": [], "changed": [], "restart_needed": [],
        }  # fmt: skip
        written(server.config, "port = 'x'")
        answer = server.post("/v1/models/reload", {})
        assert (answer.status, answer.error["code"]) == (400, "invalid_settings")
    finally:
        written(server.config, before)
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: server.get("/v1/models/d").status == 404)


def test_metrics_are_what_prometheus_reads(server):
    before = metrics(server)
    server.chat("a", "hello")

    def grown(*name):
        return metrics(server).get(name, 0) - before.get(name, 0)

    eventually(lambda: grown("mlx_server_requests_total", "a", "openai", "stop") == 1)  # its answer may come before
    after = metrics(server)
    assert grown("mlx_server_loads_total", "a", "loaded") == 1
    assert grown("mlx_server_completion_tokens_total", "a") > 3
    assert grown("mlx_server_time_to_first_token_seconds_count", "a", "openai") == 1
    assert after["mlx_server_loaded", "a"] == 1
    assert after["mlx_server_memory_reserved_bytes",] == after["mlx_server_reserved_bytes", "a"] > 0


def test_the_dashboard_asks_for_metrics_that_exist(server):
    server.chat("a", "hello")
    known = {name for name, *_ in metrics(server)}
    asked = set(re.findall(r"mlx_server_\w+", (ROOT / "deploy" / "grafana-dashboard.json").read_text()))
    assert asked - known == {"mlx_server_unloads_total"} - known


def test_a_request_has_one_line_in_the_log_and_an_id(server):
    connection = server.connect()
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hello"}]})
    connection.request("POST", "/v1/chat/completions", body, {"X-Request-Id": "my-id-1"})
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.headers["x-request-id"] == "my-id-1"
    lines = eventually(lambda: [line for line in logged(server) if line.get("id") == "my-id-1"])
    assert [(line["message"], line["model"], line["outcome"], line["status"]) for line in lines] == [
        ("request", "a", "stop", 200)
    ]
    assert lines[0]["completion_tokens"] > 3
    assert lines[0]["dialect"] == "openai"
    assert any(line["message"] == "transition" and line["to"] == "loaded" for line in logged(server))


def test_an_id_that_would_forge_a_header_is_replaced(server):
    connection = server.connect()
    connection.request("GET", "/health", headers={"X-Request-Id": "x" * 500})
    response = connection.getresponse()
    response.read()
    connection.close()
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_the_settings_can_be_checked_alone(tmp_path):
    good = written(tmp_path / "good.toml", '[models.a]\nsource = "org/a"')
    wrong = written(tmp_path / "wrong.toml", "port = -1")
    assert run_server("--check-config", "--config", str(good)).status == 0
    ended = run_server("--check-config", "--config", str(wrong))
    assert (ended.status, "port: -1 is not valid" in ended.stderr) == (2, True)


def test_the_example_file_names_every_setting_with_its_default():
    text = (ROOT / "models.example.toml").read_text()
    for name in [*settings_of(Settings), *MODEL_FIELDS, *MODEL_DEFAULTS, *POLICY_FIELDS, "aliases"]:
        assert re.search(rf"^(# )?{name} = ", text, re.MULTILINE), name
    scalars = text.partition("[models.small]")[0]
    text = re.sub(r"^# (\w+ = )", r"\1", scalars, flags=re.MULTILINE)
    path = Path(ROOT / "models.example.toml")
    assert build(["--config", str(path)], {}, Settings()).models[0].key == "small"
    import tomllib

    stated = tomllib.loads(text)
    defaults = Settings()
    sizes = {"max_body_bytes", "max_image_bytes", "max_prompt_bytes", "response_store_bytes"}
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
    assert {name: value for name, value in listed.items() if name not in sizes} == {
        name: getattr(defaults, name) for name in stated if name not in sizes
    }


def test_the_default_models_can_be_estimated_without_loading_them():
    embedded = {spec.key: estimate.estimate(spec) for spec in DEFAULT_MODELS if spec.source.startswith("embedded:")}
    assert embedded.keys() == {"smollm2", "smollm2-think", "minilm"}
    assert embedded.pop("minilm").total > 90 << 20
    assert all(each.total > 500 << 20 for each in embedded.values())
