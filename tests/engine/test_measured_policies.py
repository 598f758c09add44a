"""Policies are measured in idle steps, by an injected clock; the next load of the shape has what was faster."""

import json
from contextlib import contextmanager
from dataclasses import replace

from mlxserver.engine.mlx import nn

import pytest
from mlx_lm.models import llama

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.kept_choices import Choice, KeptChoices
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.idle_steps import IdleTurns
from mlxserver.engine.runners.measured_policies import Measurement, Result, speedup
from mlxserver.engine.runners.model_policy import choice_name, model_shape
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.worker.runner import PAUSE
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.measurements import Clock, granted, refused
from tools.harness.models import tiny_llama

PADDED = replace(CPU, candidates=("pad_slots",))


class Loads:
    """Loads of one model in a process whose choices are kept in a folder."""

    def __init__(self, tmp_path):
        self.spec = ModelSpec("m", str(tiny_llama(tmp_path / "m", hidden=64, layers=1)), max_running=2)
        self.kept = KeptChoices(tmp_path / "policies")
        self.folder = tmp_path / "policies"

    def load(self, clock, device=CPU, **fields):
        spec = replace(self.spec, **fields)
        return Builder(10.0, policy=device, kept_choices=self.kept, clock=clock).build(spec)

    def measure(self, clock, device=CPU, **fields):
        """The facts of a load, and its idle steps."""
        runner = self.load(clock, device, **fields)
        steps = list(runner.idle_steps)
        runner.batch.close()
        return runner.facts.policy, steps

    @property
    def choices(self):
        return list(self.kept.all())


@pytest.fixture
def loads(tmp_path):
    return Loads(tmp_path)


def test_what_was_faster_is_taken_at_the_next_load_and_not_measured_again(loads):
    facts, steps = loads.measure(Clock(1.0, 0.5))
    assert (facts.fuse_projections, facts.measured) == (False, ())
    assert set(steps) == {"present policy", "fuse_projections", "self-check"}
    assert [choice.fields for choice in loads.choices] == [{"fuse_projections": True}]
    assert loads.choices[0].speedups["fuse_projections"] == pytest.approx(2)
    facts, steps = loads.measure(Clock(1.0, 0.5))
    assert (facts.fuse_projections, facts.measured, steps) == (True, ("fuse_projections",), [])


def test_the_model_is_as_it_was_loaded_after_every_sample(loads):
    runner = loads.load(Clock(1.0, 0.5))
    expected = Driver(runner.batch, sequence(1, prompt(9))).finish()
    for number, _ in enumerate(runner.idle_steps, 2):
        assert Driver(runner.batch, sequence(number, prompt(9))).finish()[number] == expected[1]
    runner.batch.close()


def test_a_measured_policy_gives_the_same_tokens(loads):
    plain = loads.load(Clock(1.0, 0.5))
    expected = Driver(plain.batch, sequence(1, prompt(9))).finish()
    list(plain.idle_steps)
    fused = loads.load(Clock(1.0))
    assert fused.facts.policy.fuse_projections
    assert Driver(fused.batch, sequence(1, prompt(9))).finish() == expected


@pytest.mark.parametrize("seconds", [0.96, 1.0, 3.0])
def test_a_candidate_that_is_not_faster_by_a_margin_is_left_and_not_measured_again(loads, seconds):
    loads.measure(Clock(1.0, seconds))
    assert [choice.fields for choice in loads.choices] == [{}]
    facts, steps = loads.measure(Clock(1.0, 0.5))
    assert (facts.fuse_projections, steps) == (False, [])


def test_a_setting_fixes_a_field_whatever_was_measured(loads):
    loads.measure(Clock(1.0, 0.5))
    facts, steps = loads.measure(Clock(1.0, 0.5), policy={"fuse_projections": False, "pad_slots": True})
    assert (facts.fuse_projections, facts.pad_slots, steps) == (False, True, [])
    assert (set(facts.fixed), facts.measured) == ({"fuse_projections", "pad_slots"}, ())


def test_a_setting_brings_what_it_needs_and_contradictions_are_refused(loads):
    assert CPU.with_fields({"compile_steps": True}).pad_slots
    assert not replace(CPU, pad_slots=True, compile_steps=True).with_fields({"pad_slots": False}).compile_steps
    with pytest.raises(LoadFailed, match="compiled steps need padded slots"):
        loads.load(Clock(1.0), policy={"compile_steps": True, "pad_slots": False})


def test_candidates_are_measured_anew_beside_the_one_that_was_adopted(loads):
    device = replace(CPU, candidates=("fuse_projections", "pad_slots"))
    together, alone = [1.0, 0.5, 0.8] * 15, [0.5, 0.4] * 15
    loads.measure(Clock(*together, *alone), device)
    (choice,) = loads.choices
    assert choice.fields == {"fuse_projections": True, "pad_slots": True}


@pytest.mark.parametrize("name", ["gemma3_text", "nemotron_h"])
def test_what_makes_no_difference_to_a_model_is_not_measured(name):
    assert list(measurement(random_model(name), PADDED).steps()) == []


WHOLE = {"form": 1, "model": "m", "device": "d", "fields": {}, "speedups": {"fuse_projections": 1.0}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        WHOLE | {"form": 2},
        WHOLE | {"fields": {"fuse_projections": 1}},
        WHOLE | {"fields": {"of_2030": True}},
        WHOLE | {"fields": None},
        WHOLE | {"speedups": {"pad_slots": "x"}},
        WHOLE | {"speedups": {"pad_slots": float("inf")}},
    ],
)
def test_a_damaged_or_foreign_file_is_left_out(tmp_path, content):
    kept = KeptChoices(tmp_path)
    kept.store("name", Choice("m", "d"))
    assert (kept.find("name"), list(kept.all())) == (Choice("m", "d"), [Choice("m", "d")])
    (tmp_path / "name.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert (kept.find("name"), list(kept.all())) == (None, [])


def test_what_can_be_no_policy_is_measured_anew(loads):
    loads.measure(Clock(1.0, 0.5))
    (file,) = loads.folder.iterdir()
    file.write_text(json.dumps(WHOLE | {"fields": {"compile_steps": True, "pad_slots": False}}))
    facts, steps = loads.measure(Clock(1.0, 0.5))
    assert (facts.measured, bool(steps)) == ((), True)
    assert [choice.fields for choice in loads.choices] == [{"fuse_projections": True}]


def test_a_folder_that_cannot_be_written_keeps_nothing_and_harms_nothing(loads):
    loads.folder.write_text("")
    assert loads.measure(Clock(1.0, 0.5))[1]
    assert loads.choices == []


def test_every_other_shape_format_device_and_version_has_another_name(loads, monkeypatch):
    config = sources.checkpoint_metadata(loads.spec.source).config
    names = {choice_name(loads.spec, config, CPU), choice_name(replace(loads.spec, key="n", ttl=3.0), config, CPU)}
    assert len(names) == 1
    names |= {
        choice_name(loads.spec, {**config, "hidden_size": 128}, CPU),
        choice_name(loads.spec, {**config, "quantization": {"bits": 4}}, CPU),
        choice_name(replace(loads.spec, kv_bits=8), config, CPU),
        choice_name(replace(loads.spec, weights="bfloat16"), config, CPU),
        choice_name(loads.spec, config, PADDED),
        choice_name(loads.spec, config, CPU, "another version"),
    }
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    names.add(choice_name(loads.spec, config, CPU))
    assert len(names) == 8


def test_a_choice_is_shown_in_one_line():
    choice = Choice(
        "llama", "cpu", {"pad_slots": False}, {"pad_slots": 1.25, "compile_steps": 0.0, "decode_kernel": 0.9}
    )
    expected = "pad_slots off, 1.25 times as fast; compile_steps unchanged, failed; decode_kernel unchanged, 0.90"
    assert str(choice) == f"llama: {expected} times as fast"
    config = {"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "quantization": {"bits": 4}}
    assert model_shape(config) == "qwen3, 28 layers of 1024, 4 bits"


# -- one measurement ------------------------------------------------------------------------------------------------


def measurement(model, policy=CPU, clock=None, results=None, borrowing=granted, **fields):
    functions = {
        "is_right": lambda own: fitting_policy(model, own, "m") == own,
        "is_quiet": lambda: True,
        "keep": [].append if results is None else results.append,
    } | fields
    clock = clock or Clock(1.0, 0.5)
    return Measurement("m", model, policy, policy.candidates, 2, borrowing=borrowing, clock=clock, **functions)


class Untraceable(llama.Model):
    """A model that can't be compiled: it looks at its inputs."""

    def __call__(self, inputs, cache=None, **more):
        assert inputs.max().item() >= 0
        return super().__call__(inputs, cache=cache, **more)


def test_a_candidate_that_raises_is_dropped_and_counts_as_failed(caplog):
    model = random_model("llama")
    model.__class__ = Untraceable
    results = []
    policy = replace(CPU, candidates=("compile_steps",))
    list(measurement(model, policy, results=results).steps())
    assert results[-1] == Result({}, {"compile_steps": 0.0})
    assert "m: compile_steps is dropped: " in caplog.text


def test_a_candidate_that_fails_the_self_check_is_not_adopted():
    results = []
    list(measurement(random_model("llama"), PADDED, results=results, is_right=lambda policy: False).steps())
    assert results[-1] == Result({}, {"pad_slots": 0.0})


def test_without_memory_nothing_is_measured_and_nothing_is_known():
    results = []
    assert list(measurement(random_model("llama"), results=results, borrowing=refused).steps()) == []
    assert results[-1] == Result({}, {})


def test_a_candidate_that_does_not_fit_is_left_for_another_load():
    @contextmanager
    def borrowing(bytes):
        asked.append(bytes)
        yield bytes == min(asked)

    asked, results = [], []
    model = random_model("llama")
    steps = list(
        measurement(model, replace(CPU, candidates=("fuse_projections",)), results=results, borrowing=borrowing).steps()
    )
    assert "fuse_projections" not in steps
    assert results[-1] == Result({}, {})


def test_a_sample_beside_another_model_is_taken_again():
    quiet = iter([True, False, False])
    work = measurement(random_model("llama"), PADDED, Clock(1.0), is_quiet=lambda: next(quiet, True))
    steps = [step for _, step in zip(range(5), work.steps(), strict=False)]
    assert steps == ["present policy", PAUSE, PAUSE, "pad_slots", "present policy"]


def test_an_unload_in_the_middle_leaves_nothing_behind():
    model, results = random_model("llama"), []
    steps = measurement(model, replace(CPU, candidates=("fuse_projections",)), results=results).steps()
    expected = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    for _ in range(4):
        next(steps)
    steps.close()
    assert sum(isinstance(layer, nn.Linear) for layer in model.modules()) == expected
    assert results[-1] == Result({}, {})


def test_a_candidate_that_ends_the_process_is_not_tried_again():
    class End(BaseException):
        """As a crash: nothing that comes behind it is done."""

    results, clock = [], Clock(1.0)
    steps = measurement(random_model("llama"), PADDED, lambda: clock(), results=results).steps()
    next(steps)

    def crash():
        raise End

    clock.__class__ = type("Broken", (Clock,), {"__call__": lambda self: crash()})
    with pytest.raises(End):
        next(steps)
    assert results[-1] == Result({}, {"pad_slots": 0.0})


def test_the_speedup_is_the_geometric_mean_of_medians():
    assert speedup([[1.0, 9.0, 1.0], [4.0]], [[0.5, 0.5, 7.0], [8.0]]) == pytest.approx(1.0)
    assert speedup([[3.0], [3.0]], [[1.0], [1.0]]) == pytest.approx(3.0)


def test_a_candidate_that_is_faster_now_and_then_is_left_for_another_load():
    results = []
    durations = [1.0, 0.5] * 12 + [1.0, 2.0] * 3  # in the last of five rounds
    list(measurement(random_model("llama"), PADDED, Clock(*durations), results).steps())
    assert results[-1] == Result({}, {})


# -- turns ----------------------------------------------------------------------------------------------------------


def test_one_model_at_a_time_does_an_idle_step_and_none_beside_streams():
    turns, quiet, seen = IdleTurns(), [True], []
    other = turns.taken(iter("ab"), lambda: True)

    def steps():
        for number in range(2):
            seen.append(next(other))
            yield number

    own = turns.taken(steps(), lambda: quiet[0])
    assert next(own) == 0
    assert seen == [PAUSE]
    quiet[0] = False
    assert next(own) is PAUSE
    quiet[0] = True
    assert (next(own), next(other)) == (1, "a")
    assert (list(own), list(other)) == ([], ["b"])


def test_idle_steps_wait_while_another_model_of_the_process_has_sequences(loads):
    builder = Builder(10.0, policy=CPU, kept_choices=loads.kept, clock=Clock(1.0))
    one, other = (builder.build(replace(loads.spec, key=key)) for key in ("one", "other"))
    other.batch.insert([sequence(1, prompt(9))])
    assert next(one.idle_steps) is PAUSE
    other.batch.remove([1])
    assert next(one.idle_steps) == "present policy"
