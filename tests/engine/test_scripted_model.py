"""Test models: real mlx-lm loads them, and a scripted one generates its script."""

import json

import pytest
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.reasoning_formats import thinking_tags
from mlxserver.engine.prompt.formats import FORMATS, find_type
from tests.support.conversations import question
from tools.harness.models import scripted_model, tiny_llama
from tools.harness.scripts import Script


def generate(path, message, *, temperature=0.0, max_tokens=40):
    """What the model in `path` answers, end-of-sequence included as text."""
    model, tokenizer, config = load(str(path), return_config=True)
    prompt = FORMATS[find_type(tokenizer)](tokenizer, config).format(question(message))
    sampler = make_sampler(temperature)
    tokens = [r.token for r in stream_generate(model, tokenizer, list(prompt.tokens), max_tokens, sampler=sampler)]
    detokenizer = make_detokenizer(tokenizer)
    return "".join([detokenizer.feed(token) for token in tokens] + [detokenizer.flush()]), tokens


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("say hello please", "Hello there, and hello there again."),
        ("think hard", "<think>\nTwo and two are four.\n</think>\n\nIt is four."),
        ("an emoji", "Family: 👨‍👩 end"),
        ("use a tool", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'),
        ("no such word", "Hello there, and hello there again."),
    ],
)
def test_a_script_is_generated_to_the_letter_at_any_temperature(scripted_path, message, answer, temperature):
    assert generate(scripted_path, message, temperature=temperature)[0] == answer + "<|im_end|>"


def test_an_endless_script_begins_again(scripted_path):
    assert generate(scripted_path, "forever", max_tokens=5)[0] == "tick tock tick tock tick "


def test_the_caller_chooses_the_tokens(tmp_path):
    path = scripted_model(tmp_path, {"x": Script(["<th", "ink>", "a", "a", "a", "</think>"])})
    assert len(generate(path, "x")[1]) == 7


def test_a_scripted_model_can_have_its_thinking_opened_by_the_template(tmp_path):
    path = scripted_model(tmp_path, {"x": "a</think>b"}, generation_prompt="<think>\n", tokens=("<think>", "</think>"))
    _, tokenizer, config = load(str(path), return_config=True)
    assert (find_type(tokenizer), thinking_tags(tokenizer)) == ("thinking", ("<think>", "</think>"))
    prompt = FORMATS["thinking"](tokenizer, config).format(question("x"))
    assert prompt.opens_thinking
    assert generate(path, "x")[0] == "a</think>b<|im_end|>"


def test_a_tiny_llama_is_made_from_its_seed_and_goes_on(tmp_path):
    one, again, other = (tiny_llama(tmp_path / name, seed=seed) for name, seed in (("1", 1), ("2", 1), ("3", 2)))
    generated = [generate(path, "Hello", max_tokens=20)[1] for path in (one, again, other)]
    assert generated[0] == generated[1] != generated[2]
    assert {len(tokens) for tokens in generated} == {20}
    assert json.loads((one / "generation_config.json").read_text())["eos_token_id"] == 1
