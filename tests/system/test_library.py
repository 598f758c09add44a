"""Models of this machine are offered by a server under their names, and loaded by the request that names one."""

import json
import shutil

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import estimate
from tests.support.local_models import in_hub, in_lm_studio, in_ollama
from tests.support.scripts import SCRIPTS
from tools.harness.running_server import eventually, running_server
from tools.harness.tiny_gguf import write_tiny_gguf

HELLO = SCRIPTS["hello"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, scripted_path):
    """A user's home directory with a model of each kind."""
    home = tmp_path_factory.mktemp("home")
    gguf = write_tiny_gguf(home / "tiny.gguf")
    in_hub(home / "hub", "org/Scripted", scripted_path)
    damaged = in_hub(home / "hub", "org/damaged", scripted_path)
    next(damaged.glob("snapshots/*/model.safetensors")).resolve().unlink()
    in_lm_studio(home / ".lmstudio" / "models", "publisher/studio", scripted_path)
    in_ollama(home / ".ollama" / "models", "tiny", "latest", gguf)
    shutil.copytree(scripted_path, home / "own" / "mine")
    shutil.copytree(scripted_path, home / "own" / "fixed")
    return home


@pytest.fixture(scope="module")
def server(home, scripted_path):
    variables = {"HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "MLX_SERVER_LIBRARY": "true"}
    variables |= {"MLX_SERVER_CACHE": str(home / "cache"), "MLX_SERVER_MODEL_DIRS": str(home / "own")}
    flags = ("--no-defaults", "--model", f"mine={scripted_path}", "--model", f"other={home / 'own' / 'fixed'}")
    with running_server(*flags, variables=variables) as server:
        yield server


def listed(server):
    return {model["id"]: model for model in server.get("/v1/models").json["data"]}


def test_models_of_each_kind_are_listed_and_none_is_loaded(server):
    eventually(lambda: len(listed(server)) > 2)
    models = listed(server)
    assert [*models] == ["mine", "other", "org/Scripted", "publisher/studio", "tiny:latest"]
    assert {model["status"]["value"] for model in models.values()} == {"unloaded"}
    assert {key: model["aliases"] for key, model in models.items() if model["aliases"]} == {
        "org/Scripted": ["scripted"],
        "publisher/studio": ["studio"],
        "tiny:latest": ["tiny"],
    }
    local = models["publisher/studio"]["local"]
    assert (local["place"], local["format"], local["architecture"], local["fits"]) == (
        "lmstudio",
        "mlx",
        "llama",
        "now",
    )
    assert local["size_bytes"] > 0
    assert models["tiny:latest"]["context_length"] == 128
    assert models["mine"]["local"] is None  # registered, with files of its own
    assert models["other"]["local"]["place"] == "directory"  # registered, with files of the library


def test_the_library_has_damaged_ones_with_their_reasons(server):
    library = {model["id"]: model for model in server.get("/v1/library").json["data"]}
    assert {key for key, model in library.items() if model["error"]} == {"org/damaged"}
    assert "model.safetensors missing" in library["org/damaged"]["error"]
    assert library["org/damaged"]["fits"] is library["org/damaged"]["format"] is None
    assert {"other", "mine"} <= library.keys()


@pytest.mark.parametrize("name", ["org/Scripted", "studio", "other"])
def test_full_names_and_short_ones_load_a_model(server, name):
    server.get("/v1/library")
    assert server.chat(name, "hello").message["content"] == HELLO
    assert server.status(name) == "loaded"
    assert sum(name in (model["id"], *model["aliases"]) for model in listed(server).values()) == 1


def test_a_blob_of_ollamas_is_converted_and_asked(server):
    server.get("/v1/library")
    answer = server.chat("tiny", "hello", max_tokens=3)
    assert answer.status == 200, answer.body
    assert server.model("tiny:latest")["context_length"] == 128


def test_a_damaged_model_does_not_exist_for_requests(server):
    server.get("/v1/library")
    assert server.chat("org/damaged", "hello").error["code"] == "model_not_found"
    assert server.get("/v1/models/org/damaged").error["code"] == "model_not_found"


def test_a_load_takes_names_of_the_library(server):
    server.get("/v1/library")
    answer = server.post("/v1/models/load", {"model": "publisher/studio"})
    assert answer.json["key"] == "publisher/studio"
    assert server.post("/v1/models/unload", {"key": "studio"}).status == 200
    assert server.status("publisher/studio") == "unloaded"


def test_a_model_that_arrives_is_found_and_one_that_is_removed_vanishes(server, home):
    new = shutil.copytree(home / "own" / "fixed", home / "own" / "new")
    assert "new" in {model["id"] for model in server.get("/v1/library").json["data"]}
    assert server.chat("new", "hello").status == 200
    server.post("/v1/models/unload", {"key": "new"})
    shutil.rmtree(new)
    server.get("/v1/library")
    assert "new" not in listed(server)
    assert server.chat("new", "hello").status == 404


def test_without_a_library_or_loads_on_demand(home, scripted_path):
    variables = {"HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    with running_server("--no-defaults", "--library=false", variables=variables) as server:
        assert server.get("/v1/library").json["data"] == []
        assert server.chat("studio", "hello").status == 404
    one = estimate.estimate(ModelSpec("a", str(scripted_path))).total
    flags = ("--no-defaults", "--library", "--load-on-demand=false", f"--memory-limit={one // 100}")
    with running_server(*flags, variables=variables) as server:
        library = {model["id"]: model for model in server.get("/v1/library").json["data"]}
        assert library["publisher/studio"]["fits"] == "never"
        assert server.chat("studio", "hello").error["code"] == "model_not_loaded"
        assert json.dumps(library).count("unloaded") == len(library)
