"""Boundaries: where prompts of a conversation are likely to differ, found from their rendering."""

from itertools import pairwise

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlxserver.engine.prompt.formats import FORMATS
from tests.support.conversations import chat_prompt
from tools.harness.models import CHATML, tiny_llama

OPENING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
SYSTEM = {"role": "system", "content": "You are brief and kind."}
HISTORY = [SYSTEM, {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(tiny_llama(tmp_path, template=OPENING))


def parts(tokenizer, messages, kind="thinking", **fields):
    """The text of a prompt, cut at its boundaries."""
    prompt = FORMATS[kind](tokenizer, {}, finds_boundaries=True).format(chat_prompt(messages, **fields))
    cuts = [0, *prompt.boundaries, len(prompt.tokens)]
    return [tokenizer.decode(prompt.tokens[start:end]) for start, end in pairwise(cuts)]


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_prompt_is_cut_behind_the_system_message_and_where_the_answer_begins(tokenizer, kind):
    assert parts(tokenizer, HISTORY[:2], kind) == [
        "<|im_start|>system\nYou are brief and kind.<|im_end|>\n<|im_start|>user\n",
        "Hello there<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
    ]


def test_a_later_prompt_is_cut_before_its_last_message_too(tokenizer):
    assert parts(tokenizer, [*HISTORY, {"role": "user", "content": "And you?"}])[1:] == [
        "Hello there<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\n",
        "And you?<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
    ]


def test_an_answer_that_is_continued_is_cut_before_it(tokenizer):
    *_, before, answer = parts(tokenizer, HISTORY, continues_answer=True)
    assert before.endswith("<|im_start|>assistant\n")
    assert answer == "Hi"


def test_a_template_that_refuses_the_changed_messages_leaves_boundaries_out(tmp_path):
    strict = "{% if '\u2042' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + OPENING
    tokenizer = load_tokenizer(tiny_llama(tmp_path, template=strict))
    assert parts(tokenizer, HISTORY[:2])[-1] == "<|im_start|>assistant\n<think>\n"


def test_control_tokens_in_a_message_cost_no_more_than_a_boundary(tokenizer):
    messages = [SYSTEM | {"content": "Say <|im_end|> and <|im_start|>."}, HISTORY[1]]
    prompt = FORMATS["thinking"](tokenizer, {}, finds_boundaries=True).format(chat_prompt(messages))
    assert all(0 < boundary < len(prompt.tokens) for boundary in prompt.boundaries)


def test_boundaries_are_found_only_where_they_are_used(tokenizer):
    assert FORMATS["thinking"](tokenizer, {}).format(chat_prompt(HISTORY[:2])).boundaries == ()


def test_a_tools_result_is_cut_off_before_its_content(tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = [
        *HISTORY,
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "So:", "tool_calls": [call]},
    ]
    *_, before, result, _ = parts(tokenizer, [*asked, {"role": "tool", "tool_call_id": "call_1", "content": "a tree"}])
    assert before.endswith("<|im_end|>\n<|im_start|>user\n")
    assert "So:" in before
    assert "a tree" in result


def test_a_template_that_numbers_its_messages_has_the_same_boundaries(tmp_path):
    """Its last messages are not rendered alone as they are behind the others."""
    numbered = OPENING.replace("+ message.content +", "+ message.content + ' ' ~ loop.index ~")
    tokenizer = load_tokenizer(tiny_llama(tmp_path, template=numbered))
    *_, last, opening = parts(tokenizer, [*HISTORY, {"role": "user", "content": "And you?"}])
    assert last.startswith("And you? 4")
    assert opening == "<|im_start|>assistant\n<think>\n"
