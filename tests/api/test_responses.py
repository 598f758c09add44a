"""Answers beside those of generating endpoints: what OpenAI's own types take, and of the published schemas."""

import json

import pytest
from openai.types import Model

from mlxserver.api.dialect import Failure
from mlxserver.api.endpoints import ENDPOINTS, encode_failure
from mlxserver.api.model_status import MemoryEstimate, ModelStatus, Progress
from mlxserver.api.native.apply_template import rendered
from mlxserver.api.native.load import load_progress, loaded
from mlxserver.api.native.tokenize import detokenized, tokenized
from mlxserver.api.native.unload import unloaded
from mlxserver.api.openai.models import model_card, model_list
from mlxserver.api.openai.usage import timings_object, usage_object
from mlxserver.engine.errors import Projection
from mlxserver.engine.events import Timings, Usage
from mlxserver.engine.requests import Execution, PolicyFacts
from tests.support.published import check


def test_usage_adds_up():
    assert usage_object(Usage(3, 4, 2, 1)) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_timings_are_named_as_llama_cpp_names_them():
    assert timings_object(Usage(10, 4, cached_tokens=2, timings=Timings(0.5, 2, 0.1))) == {
        "queue_ms": 500.0,
        "cache_n": 2,
        "prompt_n": 8,
        "prompt_ms": 2000.0,
        "prompt_per_token_ms": 250.0,
        "prompt_per_second": 4.0,
        "predicted_n": 4,
        "predicted_ms": 100.0,
        "predicted_per_token_ms": 25.0,
        "predicted_per_second": 40.0,
    }


def test_what_took_no_time_has_no_rate():
    timings = timings_object(Usage(1, 0, cached_tokens=1))
    assert timings["prompt_per_second"] == timings["predicted_per_token_ms"] == 0.0


def test_a_model_is_openais_with_its_state_beside():
    status = ModelStatus(
        "m", 1, "loaded", "embedded:m", type="thinking", capabilities=frozenset({"chat"}), running_requests=2
    )
    card = model_card(status)
    assert Model.model_validate(card, strict=True).id == "m"
    assert (card["status"], card["running_requests"]) == ({"value": "loaded"}, 2)
    assert [name for name, can in card["capabilities"].items() if can] == ["chat"]
    check(model_list([status]), "ModelList")


def test_a_failed_model_has_the_reason():
    card = model_card(ModelStatus("m", 1, "failed", "x", failure="no such file"))
    assert check(card, "Model")["status"] == {"value": "failed", "error": "no such file"}


def test_a_loading_model_has_its_progress_and_its_estimate():
    status = ModelStatus("m", 1, "loading", "x", estimate=MemoryEstimate(1, 2, 3), progress=Progress("reading", 1, 4))
    card = check(model_card(status), "Model")
    assert card["loading"] == {"stage": "reading", "done": 1, "total": 4}
    assert card["estimate"] == {"weights": 1, "cache": 2, "activations": 3, "total": 6}


def test_native_answers_are_of_their_schemas():
    check(loaded(ModelStatus("m", 1, "loaded", "x", memory_bytes=3, reserved_bytes=4, load_seconds=1.5)), "Loaded")
    check(load_progress(Progress("reading", 1, 4)), "LoadProgress")
    check(unloaded("m", completed=1, aborted=0, freed_bytes=3), "Unloaded")
    check(tokenized((1, 2), 100), "Tokens")
    check(detokenized("x"), "Prompt")
    check(rendered("x"), "Prompt")


OPENAI_PATHS = [endpoint.path for endpoint in ENDPOINTS if endpoint.api.name == "openai"]


@pytest.mark.parametrize("path", [*OPENAI_PATHS, "/no/such/path", ""])
def test_an_error_has_all_four_fields_at_every_path(path):
    failure = Failure("No.", "invalid_request", "messages")
    assert check(json.loads(encode_failure(path, failure)), "Error") == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": "messages", "code": None}
    }


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_an_error_is_in_the_envelope_of_its_api(endpoint):
    failure = Failure("No.", "invalid_request", "messages")
    check(json.loads(encode_failure(endpoint.path, failure)), endpoint.api.error_schema)


def test_an_error_of_memory_has_the_projection_beside():
    failure = Failure("No.", "server", projection=Projection(6, 5, 4, 3, 2, 1))
    body = check(json.loads(encode_failure("", failure)), "Error")
    assert body["projection"] == {"needed": 6, "free": 5, "evictable": 4, "pinned": 3, "busy": 2, "budget": 1}


def test_an_error_about_an_undecodable_name_can_be_sent():
    assert b"caf" in encode_failure("", Failure("caf\udce9", "server"))


def test_a_loaded_model_shows_the_paths_that_serve_it():
    assert model_card(ModelStatus("m", 1, "unloaded", "x"))["execution"] is None
    card = check(model_card(ModelStatus("m", 1, "loaded", "x", execution=Execution("single", False, False))), "Model")
    paths = {"cache": "single", "padded_prefill": False, "compiled": False, "speculation": False, "draft": None}
    assert card["execution"] == paths


def test_a_loaded_model_shows_its_policy_and_where_that_is_from():
    assert model_card(ModelStatus("m", 1, "unloaded", "x"))["policy"] is None
    policy = PolicyFacts(
        True, True, False, False, False, False, "stored", fixed=("pad_slots",), measured=("compile_steps",)
    )
    card = check(model_card(ModelStatus("m", 1, "loaded", "x", policy=policy)), "Model")
    assert (card["policy"]["compile_steps"], card["policy"]["weights"]) == (True, "stored")
    assert [*card["policy"]["fixed"], *card["policy"]["measured"]] == ["pad_slots", "compile_steps"]
