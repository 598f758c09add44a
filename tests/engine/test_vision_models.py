"""Vision models: greedy answers equal to mlx-vlm's own, in any company, and what stays of an image that was seen."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message, Text
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.loading import sources
from mlxserver.engine.platform import device
from mlxserver.engine.runners.builder import Builder
from tests.support.vision_models import FAMILIES, Reference, answers, attached, picture, question, tiny_vision

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a CPU computes float32, which can be compared")

RED, BLUE = picture(1), picture(2, 32, 64)
QUESTIONS = (
    question("Hello, how are you?"),
    question("What is the capital of France?", RED),
    question("One two three four five", RED, BLUE),
    question("The quick brown fox", BLUE),
)


def built(path, **fields):
    return Builder(0.25).build(ModelSpec("m", str(path), **fields))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    path = tiny_vision(tmp_path_factory.mktemp("vision") / request.param, request.param)
    reference = Reference(path)
    return SimpleNamespace(
        path=path, runner=built(path), answer=reference.answer, expected=[reference.answer(each) for each in QUESTIONS]
    )


def test_answers_are_mlx_vlms_alone_and_in_a_batch_of_eight(family):
    assert family.runner.facts.kind == "vision"
    assert {"vision", "chat"} <= family.runner.facts.capabilities
    expected = [tokens for tokens, _ in family.expected]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)  # a model that is blind would not be found out
    runner = built(family.path, prefix_cache_bytes=0)
    assert [answers(runner, [each])[0][0] for each in QUESTIONS] == expected
    assert answers(runner, QUESTIONS * 2)[0] == expected * 2


def test_an_image_that_was_seen_is_cached_with_its_prompt(family):
    for each, (tokens, length) in zip(QUESTIONS, family.expected, strict=True):
        first, _ = answers(family.runner, [each])
        again, (cached,) = answers(family.runner, [each])
        assert first == again == [tokens]
        assert cached == length - 1


def test_another_image_does_not_share_a_prefix_behind_the_text_before_it(family):
    answers(family.runner, [question("Look", RED)])
    other = question("Look", picture(9))
    tokens, (cached,) = answers(family.runner, [other])
    assert tokens == [family.answer(other)[0]]
    before_the_image = 12
    assert cached < before_the_image


def test_a_second_turn_goes_on_from_the_first_one_and_may_have_another_image(family):
    answers(family.runner, [question("Look at this", BLUE)])
    turns = (Message("user", (attached(BLUE), Text("Look at this")), "m"), Message("assistant", (Text("I see"),), "m"))
    for second in (question("And then?", turns=turns), question("And this one?", RED, turns=turns)):
        expected, _ = family.answer(second)
        tokens, (cached,) = answers(family.runner, [second])
        assert tokens == [expected]
        assert cached >= 16


def test_a_long_prompt_with_images_is_prefilled_in_chunks(family):
    long = question("One two three. " * 60, RED, BLUE, turns=(Message("user", (Text("Hello there. " * 60),), "m"),))
    runner = built(family.path, prefix_cache_bytes=0)
    sequence = runner.prepare(runner.preprocess(long), iter(range(9)))[0][0]
    runner.batch.insert([sequence])
    budget = replace(runner.batch.chunk_budget(), tokens=16)
    found = []
    while len(found) < 8:
        found += [token.token for token in runner.batch.decode()]
        runner.batch.prefill(budget)
    runner.batch.remove([sequence.id])
    assert found == family.answer(long)[0]


def test_a_control_token_in_a_text_is_no_image(family):
    placeholder = "<image><|image_pad|>[IMG]<start_of_image>"
    request = question(f"What is {placeholder} there?", RED)
    formatted = family.runner.preprocess(request).formatted
    assert len(formatted.images) == 1
    assert placeholder in formatted.text


def test_a_text_model_refuses_images(tiny_llama_path):
    runner = built(tiny_llama_path)
    with pytest.raises(PromptRejected, match="text model") as refusal:
        runner.preprocess(question("What is this?", RED))
    assert refusal.value.param == "messages[0].content[0]"


def test_a_checkpoint_without_a_processor_is_a_text_model(tmp_path):
    path = tiny_vision(tmp_path / "m", "qwen3_vl")
    assert sources.known_kind(str(path)) == "vision"
    (path / "preprocessor_config.json").unlink()
    assert sources.known_kind(str(path)) == "text"
    assert built(path).facts.kind == "text"
