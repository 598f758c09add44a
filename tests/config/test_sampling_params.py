"""A sampling parameter is declared once; whatever takes or lists one follows the declaration."""

from dataclasses import fields

import orjson
import pytest

from mlxserver.api.openai.chat import ChatCompletionRequest
from mlxserver.api.openai.completions import CompletionRequest
from mlxserver.api.schema.parameters import ValidationFailed, json_schema, parse
from mlxserver.client.shell.settings import PARAMETERS
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.fields import Range
from mlxserver.config.sampling_params import MODEL_DEFAULTS, NUMBERS, SamplingParams

NAMES = [field.name for field in fields(SamplingParams)]
HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def chat(**parameters):
    return parse(ChatCompletionRequest, orjson.dumps(HELLO | parameters))


def test_numbers_are_all_but_the_biases_and_all_but_the_seed_are_defaults_of_a_model():
    assert [*NUMBERS] == [name for name in NAMES if name != "logit_bias"]
    assert [*MODEL_DEFAULTS] == [name for name in NUMBERS if name != "seed"]


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_request_has_every_number_with_its_meaning_and_bounds(schema, name):
    described, range_ = json_schema(schema)["properties"][name], NUMBERS[name].range
    shape = described["anyOf"][0]
    assert (described["description"], described["default"]) == (NUMBERS[name].meaning, None)
    assert shape.get("exclusiveMinimum" if range_.is_open else "minimum") == range_.minimum
    assert shape.get("maximum", float("inf")) == range_.maximum


@pytest.mark.parametrize("name", MODEL_DEFAULTS)
def test_requests_and_configuration_take_the_same_values(name):
    setting = MODEL_DEFAULTS[name]
    bounds = [setting.range.minimum, min(setting.range.maximum, 1000)]
    for value in [*bounds, bounds[0] - 1, bounds[1] + 1, 1]:
        try:
            taken = setting.check(name, value)
        except ConfigInvalid:
            with pytest.raises(ValidationFailed):
                chat(**{name: value})
        else:
            assert chat(**{name: value}).sampling == {name: taken}


def test_what_a_request_states_is_what_it_gave():
    assert chat().sampling == {}
    assert chat(temperature=0, seed=None, logit_bias={"7": 1}).sampling == {"temperature": 0.0, "logit_bias": {7: 1.0}}


def test_every_default_is_within_its_bounds():
    defaults = SamplingParams()
    for name, setting in MODEL_DEFAULTS.items():
        assert setting.check(name, getattr(defaults, name)) == getattr(defaults, name)


def test_top_k_is_off_at_both_of_its_zeros():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_a_top_k_beyond_any_vocabulary_fits_in_the_arrays_of_the_sampler():
    assert SamplingParams(top_k=2**63 - 1).top_k == SamplingParams(top_k=10**400).top_k == 2**31 - 1


def test_the_shell_offers_every_number():
    assert NUMBERS.keys() <= set(PARAMETERS)


@pytest.mark.parametrize(
    ("range_", "words", "inside", "outside"),
    [
        (Range(0, 1, is_open=True), "more than 0 and at most 1", [0.5, 1], [0, 1.5]),
        (Range(0, is_open=True), "more than 0", [0.5, 1e9], [0, -1]),
        (Range(0, 1), "from 0 to 1", [0, 1], [-0.1, 1.1]),
        (Range(1), "at least 1", [1, 1e9], [0]),
    ],
)
def test_a_range_may_leave_its_minimum_out(range_, words, inside, outside):
    assert str(range_) == words
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in [*outside, float("nan")])
