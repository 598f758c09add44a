"""Faults of a real server process as its clients see them, and its health."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.sources import resolve
from tests.support.published import check
from tools import faults
from tools.harness.models import tiny_llama
from tools.harness.running_server import eventually, running_server
from tools.harness.tiny_gguf import write_tiny_gguf


def test_every_fault_of_the_engine_is_reported_and_the_next_request_works(tmp_path):
    seen = {row.fault: (row.stream, row.plain, row.next) for row in faults.in_the_engine(tmp_path)}
    assert seen == {
        "a tokenizer that fails on a prompt": ("500; others: going on", "500", "answered"),
        "a tokenizer that fails within an answer": (
            "error event, server_error; others: going on",
            "500",
            "answered",
        ),
        "a tokenizer whose Rust code panics": ("500; others: going on", "500", "answered"),
        "a step that throws": ("error event, step_failed", "500 step_failed", "answered"),
        "memory runs out in a step": ("answered", "answered", "answered"),
        "memory runs out twice": ("error event, out_of_memory", "answered", "answered"),
        "a thread that dies": (
            "error event, engine_stopped",
            "503 engine_stopped",
            "503 model_failed, after Retry-After answered",
        ),
        "a step that never ends, then SIGTERM": (
            "error event, engine_stopped",
            "/health/ready 503",
            "process ended: 1",
        ),
    }


def test_a_full_disk_leaves_no_half_made_model_behind(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MLX_SERVER_CACHE", str(cache))
    source = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (faults.DISK, limits[1]))
    try:
        with pytest.raises(SourceInvalid, match="it could not be converted"):
            resolve(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(tmp_path):
    """All files of a repository but one shard of its weights: what a killed process may leave in the hub's cache."""
    path = tiny_llama(tmp_path / "model")
    weights = mx.load(str(path / "model.safetensors"))
    first = dict(list(weights.items())[::2])
    mx.save_safetensors(str(path / "model-00001-of-00002.safetensors"), first, metadata={"format": "mlx"})
    (path / "model.safetensors").unlink()
    with pytest.raises(LoadFailed, match=r"'k' could not be loaded: .* Missing \d+ parameters"):
        loader.load(ModelSpec("k", str(path)))


@pytest.fixture(scope="module")
def server(tmp_path_factory, scripted_path):
    """A model that is there at the start, one that can't be, and one without any request."""
    directory = tmp_path_factory.mktemp("health")
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text('{"model_type": "llama"}')
    sources = {"good": scripted_path, "broken": directory / "broken"}
    lines = [f"[models.{key}]\nsource = {json.dumps(str(path))}\npreload = true" for key, path in sources.items()]
    config = directory / "models.toml"
    config.write_text("\n".join(lines))
    with running_server("--no-defaults", "--config", str(config), "--model", f"idle={scripted_path}") as server:
        yield server


def test_health_shows_the_state_of_every_model(server):
    answer = server.get("/health")
    body = check(answer.json, "Health")
    assert (answer.status, body["status"]) == (200, "ok")
    assert body["uptime_seconds"] > 0
    assert {key: model["status"] for key, model in body["models"].items()} == {
        "good": "loaded",
        "broken": "failed",
        "idle": "unloaded",
    }
    assert "'broken' could not be loaded" in body["models"]["broken"]["error"]


def test_the_server_is_ready_when_all_that_it_is_to_load_is_loaded(server):
    answer = server.get("/health/ready")
    assert answer.status == 503
    assert answer.json["error"]["message"] == "Not ready: broken."
    assert answer.json["error"]["code"] == "not_ready"
    server.post("/v1/models/unload", {"key": "broken", "forget": True})
    answer = server.get("/health/ready")
    assert (answer.status, check(answer.json, "Ready")["status"]) == (200, "ready")


def test_readiness_can_be_asked_of_one_model(server):
    assert server.get("/health/ready?model=good").status == 200
    answer = server.get("/health/ready?model=idle")
    assert (answer.status, answer.json["models"]["idle"]["status"]) == (503, "unloaded")
    assert server.get("/health/ready?model=missing").status == 404


def test_health_and_metrics_show_what_is_wrong(server):
    text = server.get("/metrics").body.decode()
    assert 'mlx_server_wedged{model="good"} 0.0' in text
    assert 'mlx_server_failed{model="good"} 0.0' in text


def test_a_request_aborted_by_an_unload_gets_503(server):
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.chat, "idle", "forever")
        eventually(lambda: server.model("idle")["running_requests"])
        eventually(lambda: server.status("idle") == "loaded")
        server.post("/v1/models/unload", {"key": "idle", "mode": "abort"})
        answer = asking.result()
    assert (answer.status, answer.error["code"]) == (503, "model_unloading")
    assert int(answer.headers["retry-after"]) >= 1
