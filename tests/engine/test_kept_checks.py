"""Outcomes of self-checks that are kept: found by all that they depend on, written whole, damaged ones left out."""

import json
import os
import threading
from dataclasses import asdict, replace

from mlxserver.engine.mlx import mx

import mlx.nn as nn
import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.requests import Execution
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.kept_checks import KeptChecks, Outcome, check_name
from mlxserver.engine.runners.self_check import fitting_policy
from tests.support.architectures import BASE, random_model, write_random_model

PADDED = replace(CPU, pad_slots=True, bucket_prefill=True)
ALONE = Outcome(False, False, False, "alone", "single", ("its logits change", "another reason"))


class Counted(nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.calls = 0

    def __call__(self, inputs, cache=None):
        self.calls += 1
        return self.model(inputs, cache=cache)

    @property
    def layers(self):
        return self.model.layers


@pytest.fixture
def kept(tmp_path):
    return KeptChecks(tmp_path / "checks")


def test_a_second_load_checks_nothing(kept):
    first, second = Counted(random_model("llama")), Counted(random_model("llama"))
    policy = fitting_policy(first, CPU, "m", kept)
    assert fitting_policy(second, CPU, "m", kept) == policy
    assert first.calls
    assert not second.calls


def test_what_was_turned_off_stays_off_and_the_log_has_the_reason_again(kept, caplog):
    caplog.set_level("INFO", "engine")
    fitting = [fitting_policy(random_model("gemma2"), CPU, key, kept) for key in ("one", "two")]
    assert [own.batch_cache for own in fitting] == ["single", "single"]
    first, second = (record.getMessage() for record in caplog.records if "runs as" in record.getMessage())
    assert first.removeprefix("one") == second.removeprefix("two")


@pytest.mark.parametrize("outcome", [ALONE, Outcome(True, True, False, "padded", "slots")])
def test_an_outcome_is_found_as_it_was_stored(kept, outcome):
    kept.store("name", outcome)
    assert kept.find("name") == outcome
    assert kept.find("other") is None


def test_an_outcome_is_that_of_the_policys_paths_alone():
    fitting = ALONE.applied_to(PADDED)
    assert fitting == replace(PADDED, pad_slots=False, bucket_prefill=False, prompts="alone", batch_cache="single")
    assert Outcome.of(fitting, *ALONE.reasons, *ALONE.reasons) == ALONE


def test_a_model_of_the_same_shape_has_the_same_name_whatever_its_weights():
    other = random_model("llama")
    other.model.layers[0].self_attn.q_proj.weight *= 2
    assert check_name(other, CPU) == check_name(random_model("llama"), CPU)


def quantized(bits):
    model = random_model("llama")
    nn.quantize(model, group_size=32, bits=bits)
    return model


def in_16_bits():
    model = random_model("llama")
    model.set_dtype(mx.bfloat16)
    return model


def with_other_arguments():
    model = random_model("llama")
    model.args.rope_traditional = True
    return model


def test_every_other_shape_policy_device_version_and_variable_has_another_name(monkeypatch):
    models = [random_model("llama"), random_model("gemma2"), quantized(4), quantized(8), in_16_bits()]
    names = {check_name(model, CPU) for model in [*models, with_other_arguments()]}
    names.add(check_name(models[0], PADDED))
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    names.add(check_name(models[0], CPU))
    names.add(check_name(models[0], CPU, "another version"))
    assert len(names) == 9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps(asdict(ALONE) | {"prompts": "together"}).encode(),
        json.dumps(asdict(ALONE) | {"pad_slots": 1}).encode(),
        json.dumps(asdict(ALONE) | {"reasons": None}).encode(),
        json.dumps({"prompts": "alone"}).encode(),
    ],
)
def test_a_damaged_file_is_left_out_and_replaced(kept, tmp_path, content):
    model = random_model("llama")
    name = check_name(model, CPU)
    kept.store(name, ALONE)
    file = tmp_path / "checks" / f"{name}.json"
    file.write_bytes(content)
    assert kept.find(name) is None
    assert fitting_policy(model, CPU, "m", kept) == CPU
    assert kept.find(name) == Outcome.of(CPU)


def test_a_directory_that_cannot_be_written_costs_a_check_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    assert fitting_policy(random_model("llama"), CPU, "m", KeptChecks(tmp_path / "file")) == CPU


def test_a_checkpoint_without_numbers_teaches_nothing_about_its_shape(kept):
    broken = random_model("llama")
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    fitting_policy(broken, CPU, "broken", kept)
    assert kept.find(check_name(broken, CPU)) is None


def test_writers_at_the_same_time_leave_whole_files_alone(kept, tmp_path):
    """Several processes share the directory; each file is read as one of those that were written."""
    outcomes = [replace(ALONE, reasons=("x" * 5000 * n,)) for n in range(1, 5)]
    found = []

    def write(outcome):
        for _ in range(30):
            kept.store("name", outcome)
            found.append(kept.find("name"))

    threads = [threading.Thread(target=write, args=(outcome,)) for outcome in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    assert set(found) <= set(outcomes)
    assert [file.name for file in (tmp_path / "checks").iterdir()] == ["name.json"]


def test_the_oldest_files_are_dropped(tmp_path):
    kept = KeptChecks(tmp_path / "checks", most=3)
    for n in range(5):
        kept.store(str(n), ALONE)
        os.utime(tmp_path / "checks" / f"{n}.json", (n, n))
    kept.store("new", ALONE)
    assert {file.stem for file in (tmp_path / "checks").iterdir()} == {"3", "4", "new"}


def test_a_runner_is_built_along_the_paths_of_an_earlier_check(tmp_path, kept):
    source = write_random_model(tmp_path / "m", BASE | {"model_type": "llama"})
    spec, paths = ModelSpec("m", str(source)), []
    for _ in range(2):
        paths.append(Builder(0.25, policy=CPU, kept_checks=kept).build(spec).facts.execution)
        for file in (tmp_path / "checks").iterdir():
            file.write_text(json.dumps(asdict(ALONE)))
    assert paths == [Execution("slots", True, False, speculation=True), Execution("single", False, False)]
