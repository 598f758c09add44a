"""Stable prompts: what changes from request to request is left out, and tools come in one order."""

import pytest

from mlxserver.engine.conversation import Message, Text, ToolResult
from mlxserver.engine.prompt.formats import FORMATS
from mlxserver.engine.prompt.volatile import without_volatile_lines
from mlxserver.engine.requests import ChatPrompt
from tests.support.conversations import chat_prompt

HEADER = "x-anthropic-billing-header: cc_version=2.1.332.{}; cc_entrypoint=cli; cch={};"
COUNTER = "<total_tokens>{} tokens left</total_tokens>"
ASKED = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    return FORMATS["instruction"](tiny_tokenizer, {})


def system(*texts):
    return {"role": "system", "content": [{"type": "text", "text": text} for text in texts]}


@pytest.mark.parametrize("between", ["", "\n", "\n\n", " "])
def test_a_header_that_changes_with_each_request_is_no_part_of_the_prompt(prompts, between):
    plain = prompts.format(chat_prompt([system("You are an agent. a=b;"), ASKED]))
    for version, hash in (("1aa", "00000"), ("2bc", "f3e1")):
        header = HEADER.format(version, hash) + between
        assert prompts.format(chat_prompt([system(header, "You are an agent. a=b;"), ASKED])) == plain


def test_a_header_that_is_all_of_a_system_message_leaves_none(prompts):
    header = {"role": "system", "content": HEADER.format(1, 2)}
    assert prompts.format(chat_prompt([header, ASKED])) == prompts.format(chat_prompt([ASKED]))
    assert prompts.format(chat_prompt([header])).text


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_a_counter_of_tokens_is_left_out_wherever_it_stands(prompts, role):
    texts = [f"{COUNTER.format(count)}\nFirst.\n  {COUNTER.format(count)}\nLast." for count in (200_000, 187_654)]
    stable = prompts.format(chat_prompt([{"role": role, "content": "First.\nLast."}]))
    assert [prompts.format(chat_prompt([{"role": role, "content": text}])) for text in texts] == [stable, stable]


@pytest.mark.parametrize(
    "text",
    ["<total_tokens>", "What is <total_tokens>5</total_tokens>?", "The x-anthropic-billing-header: a=b;", "", "\n"],
)
def test_text_that_only_speaks_of_such_lines_stays(text):
    messages = [Message(role, (Text(text),)) for role in ("system", "user")]
    assert list(without_volatile_lines(messages)) == messages


def test_answers_and_results_stay():
    line = COUNTER.format(1)
    messages = [Message("assistant", (Text(line),)), Message("tool", (ToolResult("1", line),))]
    assert list(without_volatile_lines(messages)) == messages


def test_each_part_of_a_dialect_is_read():
    parts = (Text(HEADER.format(1, 2)), Text("You are an agent."))
    assert [*without_volatile_lines([Message("system", parts)])] == [Message("system", parts[1:])]


def test_a_message_of_a_counter_alone_stays_a_message(prompts):
    prompt = ChatPrompt((Message("user", (Text(COUNTER.format(3)),)),))
    assert "<|im_start|>user\n<|im_end|>" in prompts.format(prompt).text


def test_tools_come_in_one_order(prompts):
    names = ["write", "read", "list"]
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]
    assert prompts.format(chat_prompt([ASKED], tools)) == prompts.format(chat_prompt([ASKED], tools[::-1]))
