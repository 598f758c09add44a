"""How much one request may ask for."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.openai.chat import ChatCompletionRequest
from mlxserver.api.openai.generation import one_of
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.config.errors import ABBREVIATED_LENGTH
from mlxserver.engine.errors import ModelNotFound, ReaderTooSlow
from mlxserver.engine.events import Accepted, Delta
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.worker.generation import Generation
from tests.support.scripted_engine import request

SMALL = Limits(depth=8, messages=2, prompt_bytes=60, stops=2, biases=2, choices=2)
HELLO = [{"role": "user", "content": "hi"}]


def refused(document, limits=SMALL):
    with pytest.raises(ValidationFailed) as caught:
        parse(ChatCompletionRequest, json.dumps({"model": "m", "messages": HELLO, **document}).encode(), limits)
    return caught.value


@pytest.mark.parametrize(
    ("document", "param", "found", "limit"),
    [
        ({"messages": HELLO * 3}, "messages", "3 messages", "2"),
        ({"stop": ["a", "b", "c"]}, "stop", "3 strings", "2"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias", "3 tokens", "2"),
        ({"n": 3}, "n", "is 3", "2"),
        ({"messages": [{"role": "user", "content": "é" * 30}]}, "messages", "bytes long", "60"),
        ({"tools": ["x" * 50]}, "tools", "bytes long", "60"),
        ({"prompt": [7] * 11}, "prompt", "bytes long", "60"),
    ],
)
def test_too_much_is_refused_with_what_was_found_and_the_limit(document, param, found, limit):
    error = refused(document)
    assert error.param == param
    assert found in error.message
    assert f"at most {limit}, the limit of this server" in error.message


def test_as_much_as_allowed_is_taken():
    messages = [{"role": "user", "content": "0123456789"}, {"role": "assistant", "content": "x"}]
    document = {"model": "m", "messages": messages, "stop": ["a", "b"], "logit_bias": {"1": 1, "2": 1}, "n": 2}
    assert parse(ChatCompletionRequest, json.dumps(document).encode(), SMALL).n == 2


def nesting(value):
    if not isinstance(value, list | dict):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(nesting, items), default=0)


@given(st.integers(1, 40))
def test_depth_is_counted_whatever_it_is_made_of(depth):
    value = 1
    for level in range(depth):
        value = {"a": [1, {}], "b": value} if level % 2 else [value, "x"]
    document = {"metadata": value}
    if nesting(document) > SMALL.depth:
        assert "more than 8 lists and objects" in refused(document).message
    else:
        SMALL.check(document, 0)


@pytest.mark.parametrize("piece", ["[],", "{},", '"a",', "7,", "[[],"])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(piece):
    with pytest.raises(ValidationFailed, match="commas and opening brackets. Expected at most 500000"):
        parse(ChatCompletionRequest, b'{"model": "m", "messages": [' + piece.encode() * 500_000, Limits())


def test_a_document_at_the_bound_of_the_reader_is_refused_too():
    for body in (b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900):
        with pytest.raises(ValidationFailed):
            parse(ChatCompletionRequest, body, Limits())


def test_a_stream_that_is_not_read_ends_and_frees_its_slot():
    cancelled = []
    generation = Generation(request(), cancelled.append)
    generation.most_unread = 3
    generation.deliver([Accepted(1)])
    for _ in range(5):
        generation.deliver([Delta("x"), Delta("y")])
    assert cancelled == [generation]
    generation.deliver([], is_done=True)
    assert generation.outcome == "ReaderTooSlow"

    async def read():
        await generation.accepted()
        return await generation.events(), await generation.events()

    with pytest.raises(ReaderTooSlow, match="more than 3 of its events"):
        asyncio.run(read())


def test_errors_are_short_whatever_the_client_wrote():
    for error in (ModelNotFound("m" * 10**6, ["a"]), SourceInvalid("s" * 10**6, "expected more")):
        assert len(str(error)) < ABBREVIATED_LENGTH + 100


def test_values_that_contradict_each_other_are_named_in_short():
    with pytest.raises(ValidationFailed) as refused:
        one_of({"model": "\u2028", "name": "x" * 70_000})
    assert len(str(refused.value)) < 300
    assert "\u2028" not in str(refused.value)
