"""Messages become the prompt that the model was trained on, or are refused by name."""

import json
import logging
import re
import shutil
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers.processors import TemplateProcessing

from mlxserver.engine.conversation import ROLES, Message, Text, ToolCall, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.output.reasoning_formats import thinking_tags
from mlxserver.engine.output.tool_formats import PLAIN
from mlxserver.engine.prompt.arrangement import arrange
from mlxserver.engine.prompt.formats import FORMATS, FormattedPrompt, find_type
from mlxserver.engine.prompt.tool_text import write_plain
from mlxserver.engine.prompt.transitions import StrictTable
from mlxserver.engine.prompt.turns import admit, name_developer_system
from mlxserver.engine.requests import ChatPrompt, TextPrompt, TokenPrompt, ToolChoice
from tests.support.conversations import chat_prompt
from tools.harness.models import CHATML, scripted_model, tiny_llama

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    "{{ '<tool_call>' + tool_call.name + ARGUMENTS + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NATIVE = HERMES.replace("ARGUMENTS", "(tool_call.arguments | tojson)")
NATIVE_TEXT = HERMES.replace("ARGUMENTS", "tool_call.arguments")
NINE_LETTERS = NATIVE.replace(
    "{% set tool", "{% if tool_call.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}{% set tool"
)
ALTERNATE = """\
{%- set ns = namespace(next='user') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('a system message is the first') }}{% endif %}
    {%- elif m.role != 'tool' and not m.tool_calls %}
        {%- if m.role != ns.next %}{{ raise_exception('user and assistant take turns') }}{% endif %}
        {%- set ns.next = 'assistant' if m.role == 'user' else 'user' %}
    {%- endif %}
{%- endfor %}"""
STRICT = ALTERNATE + CHATML
PAIRED = (
    ALTERNATE
    + """\
{%- set ns = namespace(open=0) %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{% set ns.open = ns.open - 1 %}
    {%- elif ns.open %}{{ raise_exception('a call has no result') }}{% endif %}
    {%- set ns.open = ns.open + (m.tool_calls or []) | length %}
    {%- if ns.open < 0 or (loop.last and ns.open) %}{{ raise_exception('calls and results do not match') }}{% endif %}
{%- endfor %}"""
)
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
OPENING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
SWITCHED = CHATML.replace("assistant\n' }}", "assistant\n' }}{{ enable_thinking }}")


def chat(*turns, **fields):
    """A prompt of (role, content) turns."""
    return ChatPrompt(tuple(message(*turn, f"messages[{n}]") for n, turn in enumerate(turns)), **fields)


def message(role, text, origin):
    parts = (ToolResult("", text),) if role == "tool" else (Text(text),) if text else ()
    return Message(role, parts, origin)


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"


@pytest.fixture
def tokenizer_with(tmp_path):
    """The tiny llama's tokenizer with another chat template."""
    return lambda template: load_tokenizer(tiny_llama(tmp_path, template=template))


def rejection(format_, prompt):
    with pytest.raises(PromptRejected) as caught:
        format_.format(prompt)
    return caught.value


def test_the_type_is_found_from_the_template_or_the_vocabulary(tokenizer_with, tiny_tokenizer, tmp_path):
    thinker = scripted_model(tmp_path / "thinker", {"x": "y"}, tokens=("<think>", "</think>"))
    assert find_type(tiny_tokenizer) == "instruction"
    assert find_type(tokenizer_with(OPENING)) == "thinking"
    assert find_type(tokenizer_with(None)) == "instruction"
    assert find_type(load_tokenizer(thinker)) == "thinking"


def test_tags_are_the_ones_that_the_model_names(tokenizer_with, tiny_tokenizer):
    assert thinking_tags(tiny_tokenizer) == ("<think>", "</think>")
    assert thinking_tags(tokenizer_with(CHATML + "[THINK]")) == ("[THINK]", "[/THINK]")


def test_a_prompt_is_the_template_with_its_tokens(tiny_tokenizer):
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "How are you?")]
    for format_ in FORMATS.values():
        prompt = format_(tiny_tokenizer, {}).format(chat(*turns))
        assert prompt.text == chatml(*turns)
        assert list(prompt.tokens) == tiny_tokenizer.encode(prompt.text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize(
    "turns",
    [
        [("assistant", "a"), ("user", "b"), ("user", "c"), ("system", "d")],
        [("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"), ("assistant", "e")],
        [("user", "a"), ("assistant", ""), ("system", "b"), ("user", "c")],
        [("system", "a")],
    ],
)
def test_a_template_that_shows_the_messages_as_they_are_gets_them_so(tiny_tokenizer, kind, turns):
    assert FORMATS[kind](tiny_tokenizer, {}).format(chat(*turns)).text == chatml(*turns)


def test_reasoning_in_the_history_reaches_the_template(tokenizer_with):
    template = "{% for m in messages %}{{ m.reasoning_content or '' }}|{{ m.content }};{% endfor %}"
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    prompt = FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([answer, USER]))
    assert prompt.text == "2+2|4;|a;"


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_developers_message_is_a_system_message(tiny_tokenizer, kind):
    prompt = FORMATS[kind](tiny_tokenizer, {}).format(chat(("developer", "a"), ("user", "b")))
    assert prompt.text == chatml(("system", "a"), ("user", "b"))


def test_the_type_sets_the_switch_for_thinking_and_the_prompt_may_change_it(tokenizer_with):
    tokenizer = tokenizer_with(SWITCHED)
    for kind, switch in (("thinking", "True"), ("instruction", "False")):
        assert FORMATS[kind](tokenizer, {}).format(chat(("user", "a"))).text.endswith(f"assistant\n{switch}")
    asked = chat(("user", "a"), template_kwargs={"enable_thinking": False})
    assert FORMATS["thinking"](tokenizer, {}).format(asked).text.endswith("False")


SCANNED = "{% set ns = namespace(enable_thinking=true) %}" + CHATML + "{% if not ns.enable_thinking %}x{% endif %}"
NO_OFF = "{% if reasoning_effort == 'none' or enable_thinking is false %}{{ raise_exception('never off') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "budget"),
    [
        (OPENING, 0),
        (SCANNED, 0),
        (NO_OFF + OPENING, 0),
        (SWITCHED, None),
        (CHATML + "{% if thinking is false %}</think>{% endif %}", None),
        (CHATML + "{% if thinking_budget == 0 %}</think>{% endif %}", None),
        (CHATML + "{{ '</think>' if reasoning_effort == 'none' }}", None),
        (CHATML + "Reasoning: {{ reasoning_effort }}", 0),
    ],
)
def test_thinking_is_off_by_the_templates_switch_or_by_a_budget_of_0(tokenizer_with, template, budget):
    """What counts as a switch is found by trying, whatever it is called."""
    format_ = FORMATS["thinking"](tokenizer_with(template), {})
    for variables in ({"enable_thinking": False}, {"reasoning_effort": "none"}):
        off = chat(("user", "a"), template_kwargs=variables)
        assert format_.budget(off) == budget
        assert "Reasoning: none" not in format_.format(off).text
        assert ("</think>" in format_.format(off).text) is ("</think>" in template)
    assert format_.budget(chat(("user", "a"))) is None
    assert "</think>" not in format_.format(chat(("user", "a"))).text


QWEN = (
    "{% if (reasoning_effort or 'low') not in ['low', 'medium', 'xhigh'] %}{{ raise_exception('no') }}{% endif %}"
    + CHATML
    + "{{ reasoning_effort }}"
)


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize(
    ("asked", "given"),
    [("minimal", "low"), ("low", "low"), ("high", "xhigh"), ("max", "xhigh"), ("extreme", ""), (7, ""), ([], "")],
)
def test_an_effort_that_the_template_does_not_take_is_the_nearest_one(tokenizer_with, kind, asked, given):
    format_ = FORMATS[kind](tokenizer_with(QWEN), {})
    prompt = chat(("user", "a"), template_kwargs={"reasoning_effort": asked})
    assert format_.format(prompt).text.removeprefix(chatml(("user", "a"))) == given
    assert format_.budget(prompt) is None


def test_an_effort_may_have_another_name_in_the_template(tokenizer_with):
    template = CHATML + "{% if thinking_effort in ['low', 'max'] %}{{ thinking_effort }}{% endif %}"
    prompt = chat(("user", "a"), template_kwargs={"reasoning_effort": "max"})
    assert FORMATS["thinking"](tokenizer_with(template), {}).format(prompt).text.endswith("max")


@pytest.mark.parametrize(("asked", "budget"), [("low", 1024), ("medium", 4096), ("high", 16384), ("max", None)])
def test_an_effort_is_a_budget_where_the_template_has_none(tokenizer_with, asked, budget):
    prompt = chat(("user", "a"), template_kwargs={"reasoning_effort": asked})
    thinking, instruction = (FORMATS[kind](tokenizer_with(SWITCHED), {}) for kind in ("thinking", "instruction"))
    assert (thinking.budget(prompt), instruction.budget(prompt)) == (budget, None)
    assert thinking.format(prompt).text == chatml(("user", "a")) + "True"


@pytest.mark.parametrize("name", ["enable_thinking", "preserve_thinking", "no_such_variable"])
@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_variable_that_changes_nothing_is_logged(tiny_tokenizer, kind, name, caplog):
    caplog.set_level(logging.DEBUG, "engine")
    prompt = FORMATS[kind](tiny_tokenizer, {}).format(chat(("user", "a"), template_kwargs={name: True}))
    assert prompt.text == chatml(("user", "a"))
    assert (f"{name} has no effect" in caplog.text) is (kind == "instruction" or name != "enable_thinking")


def test_an_instruction_model_does_not_think_when_asked_to(tokenizer_with):
    asked = chat(("user", "a"), template_kwargs={"enable_thinking": True})
    assert FORMATS["instruction"](tokenizer_with(SWITCHED), {}).format(asked).text.endswith("False")


def test_a_variable_that_the_template_has_reaches_it(tokenizer_with):
    tokenizer = tokenizer_with(CHATML + "{{ reasoning_effort }}{{ mood }}")
    asked = chat(("user", "a"), template_kwargs={"reasoning_effort": "low", "mood": "!"})
    assert FORMATS["instruction"](tokenizer, {}).format(asked).text.endswith("low!")


@pytest.mark.parametrize(
    ("template", "content", "opens"),
    [
        (OPENING, "Hello", True),
        (OPENING.replace("<think>\n", "<think>\n\n</think>"), "<think>", False),
        (CHATML, "<think>", False),
        ("{{ messages[-1].content }}", "say <think>", False),
        ("{{ messages[-1].content }}{% if add_generation_prompt %} {% endif %}", "say <think>", False),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}<think>{% endif %}", "say <think>", True),
    ],
)
def test_only_the_template_can_open_the_thinking(tokenizer_with, template, content, opens):
    assert FORMATS["thinking"](tokenizer_with(template), {}).format(chat(("user", content))).opens_thinking is opens


def test_control_tokens_in_a_message_are_plain_text(tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    plain, typed = (
        FORMATS["instruction"](tiny_tokenizer, {}).format(chat(("user", text))) for text in ("a b", "a<|im_end|>b")
    )
    assert plain.tokens.count(eos) == typed.tokens.count(eos) == 1
    assert tiny_tokenizer.decode(list(typed.tokens)) == typed.text == chatml(("user", "a<|im_end|>b"))


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize(
    ("turns", "rendered"),
    [
        ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
        ([("system", "a"), ("developer", "b"), ("user", "c")], [("system", "a\n\nb"), ("user", "c")]),
        (
            [("user", "a"), ("assistant", None), ("assistant", "b"), ("user", "c")],
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        ([("user", "a"), ("system", "b"), ("user", "c")], [("user", "a\n\nb\n\nc")]),
        (
            [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")],
            [("user", "a"), ("assistant", "b"), ("user", "c\n\nd")],
        ),
        ([("user", "a"), ("assistant", "b"), ("system", "c")], [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ([("assistant", "a"), ("user", "b")], [("user", "Begin."), ("assistant", "a"), ("user", "b")]),
        (
            [("system", "a"), ("assistant", "b"), ("assistant", "c")],
            [("system", "a"), ("user", "Begin."), ("assistant", "b\n\nc")],
        ),
        ([("system", "a")], [("system", "a")]),
        ([("tool", "a"), ("user", "b")], [("user", "<tool_response>\na\n</tool_response>\n\nb")]),
    ],
)
def test_a_template_of_strict_turns_gets_them(tokenizer_with, kind, turns, rendered):
    assert FORMATS[kind](tokenizer_with(STRICT), {}).format(chat(*turns)).text == chatml(*rendered)


def test_an_answer_last_is_gone_on_from_where_the_template_opens_no_other(tokenizer_with):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    prompt = FORMATS["instruction"](tokenizer_with(template), {}).format(chat(("user", "a"), ("assistant", "b")))
    assert prompt.text == "user:a;assistant:b;user:Continue.;"


def test_what_is_changed_is_logged(tokenizer_with, caplog):
    caplog.set_level(logging.DEBUG, "engine")
    FORMATS["thinking"](tokenizer_with(STRICT), {}).format(chat(("user", "a"), ("user", "b"), ("system", "c")))
    assert "messages[1]: joined to the user message before" in caplog.text
    assert "messages[2]: the system message is read as the user's" in caplog.text


def test_a_system_message_stays_in_its_place_where_the_template_would_put_it_first(tokenizer_with):
    """A prompt whose beginning changes can't be had from the prefix cache."""
    hoisted = (
        "{% for m in messages if m.role == 'system' %}{{ m.content }};{% endfor %}"
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content }};{% endfor %}"
    )
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("system", "d"), ("user", "e")]
    text = FORMATS["thinking"](tokenizer_with(hoisted), {}).format(chat(*turns)).text
    assert text == "a;user:b;assistant:c;user:d\n\ne;"


def test_the_system_message_begins_the_first_user_message_where_it_has_no_role(tokenizer_with):
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    folded = FORMATS["instruction"](tokenizer_with(NO_SYSTEM), {}).format(chat(*turns))
    assert folded.text == chatml(("user", "a\n\nb"), ("assistant", "c"), ("user", "d"))
    assert (
        FORMATS["instruction"](tokenizer_with(WITHOUT_SYSTEM), {}).format(chat(*turns)).text
        == "user:a\n\nb;assistant:c;user:d;"
    )


FUNCTION = {"name": "add", "arguments": '{"a": 1}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "function": FUNCTION}]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "call_1"}
USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def calling(arguments):
    return {**CALL, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


def call_of(*ids, text=None, **fields):
    calls = [{"id": id_, "function": {"name": f"f{id_}", "arguments": "{}"}} for id_ in ids]
    return {"role": "assistant", "content": text, "tool_calls": calls, **fields}


def result_of(id_):
    return {"role": "tool", "tool_call_id": id_, "content": f"result {id_}"}


def called(*ids, text=""):
    return ("assistant", text + "".join(f"<tool_call>f{id_}{{}}</tool_call>" for id_ in ids))


def resulted(id_, text=None):
    return ("tool", text or f"result {id_}")


LATER = {"role": "user", "content": "b"}
BELOW, SEEN = ("user", "b"), ("assistant", "OK.")
NO_RESULT = "This call has no result."


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize(
    ("messages", "as_it_is", "strict"),
    [
        ([call_of("1"), LATER], [called("1"), BELOW], [called("1"), resulted("1", NO_RESULT), SEEN, BELOW]),
        (
            [call_of("1"), result_of("1"), LATER],
            [called("1"), resulted("1"), BELOW],
            [called("1"), resulted("1"), SEEN, BELOW],
        ),
        (
            [call_of("1"), call_of("2"), result_of("1"), result_of("2")],
            [called("1"), called("2"), resulted("1"), resulted("2")],
            [called("1", "2"), resulted("1"), resulted("2")],
        ),
        (
            [call_of("1", "2"), result_of("2"), LATER],
            [called("1", "2"), resulted("2"), BELOW],
            [called("1", "2"), resulted("2"), resulted("1", NO_RESULT), SEEN, BELOW],
        ),
        ([call_of("1")], [called("1")], [called("1"), resulted("1", NO_RESULT)]),
    ],
)
def test_calls_and_results_that_do_not_match_are_put_right_only_where_they_are_refused(
    tokenizer_with, kind, messages, as_it_is, strict
):
    prompt = chat_prompt([USER, *messages])
    for template, turns in ((NATIVE, as_it_is), (PAIRED + NATIVE, strict)):
        assert FORMATS[kind](tokenizer_with(template), {}).format(prompt).text == chatml(("user", "a"), *turns)


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_result_without_a_call_is_the_users_text_where_it_is_refused(tokenizer_with, kind):
    prompt = chat_prompt([USER, result_of("9"), LATER])
    turns = [("user", "a"), resulted("9"), BELOW]
    assert FORMATS[kind](tokenizer_with(NATIVE), {}).format(prompt).text == chatml(*turns)
    turns = [("user", "a\n\n<tool_response>\nresult 9\n</tool_response>\n\nb")]
    assert FORMATS[kind](tokenizer_with(PAIRED + NATIVE), {}).format(prompt).text == chatml(*turns)


def test_an_empty_answer_is_left_out_where_it_is_refused(tokenizer_with):
    template = "{% for m in messages if not m.content %}{{ raise_exception('nothing') }}{% endfor %}" + CHATML
    prompt = chat(("user", "a"), ("assistant", ""), ("user", "b"))
    assert FORMATS["thinking"](tokenizer_with(template), {}).format(prompt).text == chatml(("user", "a"), ("user", "b"))


def test_text_beside_calls_is_a_message_of_its_own_where_the_template_drops_it(tokenizer_with):
    template = NATIVE.replace("+ m.content }}", "+ ('' if m.tool_calls else m.content) }}")
    prompt = chat_prompt([USER, call_of("1", text="So:"), result_of("1")])
    turns = [("user", "a"), ("assistant", "So:"), called("1"), resulted("1")]
    assert FORMATS["instruction"](tokenizer_with(template), {}).format(prompt).text == chatml(*turns)
    turns.insert(2, ("user", "Continue."))
    assert FORMATS["instruction"](tokenizer_with(ALTERNATE + template), {}).format(prompt).text == chatml(*turns)


def test_several_calls_are_messages_of_their_own_where_the_template_takes_one(tokenizer_with):
    template = NATIVE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    prompt = chat_prompt([USER, call_of("1", "2", text="So:"), result_of("2"), result_of("1"), LATER])
    turns = [("user", "a"), called("1", text="So:"), resulted("1"), called("2"), resulted("2"), ("user", "b")]
    assert FORMATS["thinking"](tokenizer_with(template), {}).format(prompt).text == chatml(*turns)


@pytest.mark.parametrize("arguments", ['{"city": "Os', "[]", "null", "nonsense", "5", [1]])
def test_arguments_that_are_no_object_are_shown_as_they_were_written(tokenizer_with, arguments):
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    prompt = chat_prompt([USER, calling(arguments), RESULT])
    for template in (NATIVE, CHATML):
        text = FORMATS["instruction"](tokenizer_with(template), {}).format(prompt).text
        assert json.dumps({"arguments": written}) in text
    text = FORMATS["instruction"](tokenizer_with(NATIVE_TEXT), {}).format(prompt).text
    assert f"<tool_call>f{written}</tool_call>" in text


def test_calls_and_results_without_ids_are_paired_in_order(tokenizer_with):
    template = NATIVE.replace("m.role +", "m.role + (m.name or '') + (m.tool_call_id or '') +")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name}} for name in "fg"]}
    prompt = chat_prompt([USER, call, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}])
    text = FORMATS["thinking"](tokenizer_with(template), {}).format(prompt).text
    assert re.findall("tool([fg])call_([01])\n([12])", text) == [("f", "0", "1"), ("g", "1", "2")]


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_conversation_has_messages(tiny_tokenizer, kind):
    assert rejection(FORMATS[kind](tiny_tokenizer, {}), ChatPrompt(())).param == "prompt.conversation"


def test_messages_that_are_joined_lose_neither_reasoning_nor_calls(tokenizer_with):
    template = NATIVE.replace("m.content }}", "(m.reasoning_content or '') + '|' + m.content }}")
    thought = [{"role": "assistant", "content": text, "reasoning_content": text.upper()} for text in "bc"]
    prompt = chat_prompt([USER, *thought, CALL, RESULT])
    text = FORMATS["instruction"](tokenizer_with(ALTERNATE + template), {}).format(prompt).text
    called = 'B\n\nC|b\n\nc<tool_call>add{"a": 1}</tool_call>'
    assert text == chatml(("user", "|a"), ("assistant", called), ("tool", "|3"))


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize("template", [NATIVE, NATIVE_TEXT, NINE_LETTERS])
def test_a_template_with_a_place_for_tools_gets_them(tokenizer_with, kind, template):
    """And past calls in the form that it expects: arguments as an object or as text, ids of nine letters."""
    format_ = FORMATS[kind](tokenizer_with(template), {})
    prompt = format_.format(chat_prompt([USER, CALL, RESULT], tools=[TOOL]))
    called = '<tool_call>add{"a": 1}</tool_call>'
    assert prompt.text == chatml(("system", json.dumps(TOOL)), ("user", "a"), ("assistant", called), ("tool", "3"))
    assert (format_.tool_format.is_native, format_.tool_format.start) == (True, "<tool_call>")


def test_calls_and_tools_get_the_named_template_for_them(tokenizer_with):
    tokenizer = tokenizer_with(NATIVE)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "Tools! " + NATIVE}
    format_ = FORMATS["instruction"](tokenizer, {})
    assert format_.format(chat_prompt([USER])).text == chatml(("user", "a"))
    for messages, tools in (([USER], [TOOL]), ([USER, CALL, RESULT], [])):
        assert format_.format(chat_prompt(messages, tools)).text.startswith("Tools! <|im_start|>")


@pytest.mark.parametrize("needed", ["description", "parameters.properties"])
def test_a_bare_function_gets_what_the_template_needs(tokenizer_with, needed):
    template = NATIVE.replace("{{ tool | tojson }}", f"{{{{ (tool | tojson) + (tool.function.{needed} | tojson) }}}}")
    bare = {"type": "function", "function": {"name": "add"}}
    text = FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([USER], [bare])).text
    whole = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
    shown, _ = json.JSONDecoder().raw_decode(text.split("\n")[1])
    assert shown["function"] == whole
    text = FORMATS["thinking"](tokenizer_with(NATIVE), {}).format(chat_prompt([USER], [bare])).text
    assert json.dumps(bare) in text


def test_a_template_that_reads_its_tools_unasked_gets_an_empty_list(tokenizer_with):
    template = "{% for tool in tools %}{{ tool }}{% endfor %}" + CHATML
    assert FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([USER])).text == chatml(("user", "a"))


@pytest.mark.parametrize(
    "field", ["m.reasoning_content", "m.reasoning", "m.thinking", "m.thought", "m.content[0].thinking"]
)
def test_reasoning_is_given_in_the_form_that_the_template_reads(tokenizer_with, field):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and (FIELD or '') is string and FIELD %}({{ FIELD }})"
        "{{ m.content if m.content is string else m.content[1].text }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    ).replace("FIELD", field)
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    text = FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([USER, answer, USER])).text
    assert text == "a;(2+2)4;a;>"


def test_mistrals_own_template_gets_ids_of_nine_letters(tokenizer_with):
    file = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    format_ = FORMATS["instruction"](tokenizer_with(convert_tokenizer_to_chat_template(file)), {})
    text = format_.format(chat_prompt([USER, CALL, RESULT], tools=[TOOL])).text
    ids = re.findall('"(?:call_)?id": "([0-9a-z]{9})"', text)
    assert (len(ids), len(set(ids))) == (2, 1)
    assert format_.tool_format.start == "[TOOL_CALLS]"


def test_a_tools_message_has_the_name_of_the_function(tokenizer_with):
    template = NATIVE.replace("m.role +", "m.role + (m.name or '') +")
    prompt = FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([USER, CALL, RESULT]))
    assert "<|im_start|>tooladd\n3" in prompt.text


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
@pytest.mark.parametrize("system", [[], [{"role": "developer", "content": "Be brief."}]])
def test_any_other_model_gets_the_tools_described_in_the_system_message(tiny_tokenizer, kind, system):
    format_ = FORMATS[kind](tiny_tokenizer, {})
    text = format_.format(chat_prompt([*system, USER], tools=[TOOL])).text
    described = text.removeprefix("<|im_start|>system\n").removesuffix(chatml(("user", "a")))
    assert described.startswith("Be brief.\n\nYou can" if system else "You can")
    assert f"\n{json.dumps(TOOL['function'])}\n" in described
    assert '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>' in described
    assert format_.tool_format == PLAIN


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_calls_and_results_are_text_where_the_template_has_no_place_for_them(tiny_tokenizer, kind):
    call = {**CALL, "content": "So:", "tool_calls": CALL["tool_calls"] * 2}
    prompt = FORMATS[kind](tiny_tokenizer, {}).format(chat_prompt([USER, call, RESULT, RESULT, USER]))
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    result = "<tool_response>\n3\n</tool_response>"
    assert prompt.text == chatml(
        ("user", "a"), ("assistant", f"So:\n{called}\n{called}"), ("user", f"{result}\n\n{result}\n\na")
    )


def test_tools_are_described_in_the_first_user_message_where_there_is_no_system_role(tokenizer_with):
    for kind, template in (("instruction", NO_SYSTEM), ("thinking", WITHOUT_SYSTEM)):
        text = FORMATS[kind](tokenizer_with(template), {}).format(chat_prompt([USER], tools=[TOOL])).text
        assert "user" in text.split("You can call")[0]
        assert "Adds." in text


@pytest.mark.parametrize("template", [NATIVE, CHATML])
def test_tools_that_may_not_be_called_are_not_shown(tokenizer_with, template):
    format_ = FORMATS["instruction"](tokenizer_with(template), {})
    prompt = chat_prompt([USER], tools=[TOOL])
    assert format_.format(prompt, ToolChoice("none")).text == chatml(("user", "a"))
    assert "Adds." in format_.format(prompt, ToolChoice("auto")).text


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_a_call_without_arguments_has_an_empty_object(tiny_tokenizer, arguments):
    prompt = chat_prompt([USER, calling(arguments), RESULT])
    assert prompt.conversation[1].calls == [ToolCall("1", "f", {})]
    assert '{"name": "f", "arguments": {}}' in FORMATS["instruction"](tiny_tokenizer, {}).format(prompt).text


def test_calls_nested_too_deeply_are_refused(tokenizer_with):
    deep = '{"a":' * 900 + "1" + "}" * 900
    for template in (CHATML, NATIVE, NATIVE_TEXT):
        format_ = FORMATS["instruction"](tokenizer_with(template), {})
        try:
            format_.format(chat_prompt([USER, calling(deep), RESULT]))
        except PromptRejected as refused:
            assert refused.param


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_the_last_answer_is_continued(tiny_tokenizer, kind):
    prompt = FORMATS[kind](tiny_tokenizer, {}).format(
        chat(("user", "a"), ("assistant", "It is "), continues_answer=True)
    )
    assert prompt.text == chatml(("user", "a")) + "It is "
    assert tiny_tokenizer.decode(list(prompt.tokens)) == prompt.text
    assert not prompt.opens_thinking


REASONED = CHATML.replace(
    "message.content +", "'<think>' + (message.reasoning_content or '') + '</think>' + message.content +"
)


@pytest.mark.parametrize(
    ("template", "answer", "text", "opens"),
    [
        (CHATML, {"content": "<think>Well"}, "<think>Well", True),
        (CHATML, {"content": "<think>Well</think>It"}, "<think>Well</think>It", False),
        (OPENING, {"content": "It"}, "It", False),
        (REASONED, {"content": "It", "reasoning_content": "Well"}, "<think>Well</think>It", False),
        (REASONED, {"content": None, "reasoning_content": "Well"}, "<think>Well", True),
    ],
)
def test_a_continued_answer_may_stop_inside_its_reasoning(tokenizer_with, template, answer, text, opens):
    messages = [USER, {"role": "assistant", **answer}]
    format_ = FORMATS["thinking"](tokenizer_with(template), {})
    prompt = format_.format(chat_prompt(messages, continues_answer=True))
    assert prompt.text.endswith(f"<|im_start|>assistant\n{text}")
    assert prompt.opens_thinking is opens


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER], "messages[0].role"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content"),
        ([USER, {**CALL, "content": "x"}], "messages[1].content"),
    ],
)
def test_only_an_answer_with_text_can_be_continued(tiny_tokenizer, messages, param):
    for format_ in FORMATS.values():
        assert rejection(format_(tiny_tokenizer, {}), chat_prompt(messages, continues_answer=True)).param == param


def test_text_goes_to_the_model_as_it_is(tiny_tokenizer):
    format_ = FORMATS["instruction"](tiny_tokenizer, {})
    prompt = format_.format(TextPrompt("a<|im_end|>"))
    assert prompt == FormattedPrompt((*tiny_tokenizer.encode("a", add_special_tokens=False), 1), "a<|im_end|>")
    assert format_.format(TokenPrompt(prompt.tokens)) == prompt


@pytest.mark.parametrize("text", ["a", "<|im_start|>a"])
def test_text_has_one_beginning_of_a_sequence_where_the_tokenizer_sets_one(tokenizer_with, text):
    tokenizer = tokenizer_with(CHATML)
    beginning = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{beginning[0]} $A", special_tokens=[beginning]
    )
    a = tokenizer.encode("a", add_special_tokens=False)
    assert FORMATS["instruction"](tokenizer, {}).format(TextPrompt(text)).tokens == (beginning[1], *a)


@pytest.mark.parametrize("prompt", [TextPrompt(""), TextPrompt("\ud800"), TokenPrompt(()), TokenPrompt((0, -1))])
def test_a_prompt_that_is_empty_or_unknown_to_the_vocabulary_is_refused(tiny_tokenizer, prompt):
    format_ = FORMATS["thinking"](tiny_tokenizer, {})
    assert rejection(format_, prompt).param == "prompt"
    assert "expected 0 to" in str(rejection(format_, TokenPrompt((len(tiny_tokenizer),))))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only on Mondays') }}", "only on Mondays"),
        ("{{ messages[0].missing.field }}", "missing"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% if %}", "xpected"),
    ],
)
def test_what_a_template_raises_is_a_refusal_with_its_message(tokenizer_with, template, words):
    for kind in FORMATS.values():
        assert words in str(rejection(kind(tokenizer_with(template), {}), chat(("user", "a"))))


def test_text_that_is_no_unicode_is_refused(tiny_tokenizer):
    refused = rejection(FORMATS["thinking"](tiny_tokenizer, {}), chat(("user", "a\ud800")))
    assert (refused.param, "lone surrogate at 1" in str(refused)) == ("messages[0].content", True)


def test_template_arguments_cant_replace_the_template(tiny_tokenizer):
    prompt = chat(("user", "a"), template_kwargs={"chat_template": "mine"})
    assert rejection(FORMATS["instruction"](tiny_tokenizer, {}), prompt).param == "prompt.template_kwargs"


def test_a_model_without_a_template_that_is_no_mistral_refuses_clearly(tokenizer_with):
    tokenizer = tokenizer_with(None)
    for kind in FORMATS.values():
        assert "no chat template" in str(rejection(kind(tokenizer, {"model_type": "llama"}), chat(("user", "a"))))


SENTENCEPIECE = {
    "v1": (MistralTokenizer.v1, "tokenizer.model.v1"),
    "v3": (MistralTokenizer.v3, "mistral_instruct_tokenizer_240323.model.v3"),
}
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief.\nAlways."), ("user", "Hello, 世界 😀")],
    [("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", "  And 3+3?\n")],
]


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def mistral(request, tmp_path_factory):
    """Mistral's own encoder, and the same vocabulary as a Hugging Face tokenizer without a chat template."""
    reference, file = SENTENCEPIECE[request.param]
    path = tmp_path_factory.mktemp(request.param)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / file, path / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    return reference(), load_tokenizer(path)


def encoded(reference, turns):
    kinds = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    messages = [kinds[role](content=content) for role, content in turns]
    return reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one turn", "system", "three turns"])
def test_the_inst_format_is_what_mistrals_own_encoder_makes(mistral, turns):
    reference, tokenizer = mistral
    format_ = FORMATS["instruction"](tokenizer, {"model_type": "mistral"})
    prompt = format_.format(chat(*turns))
    assert list(prompt.tokens) == encoded(reference, turns)


def test_the_inst_format_of_a_tekken_vocabulary_has_no_gaps(tokenizer_with):
    tokenizer = tokenizer_with(None)
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    turns = [("user", "Hello"), ("assistant", "Hi there"), ("user", "Bye now")]
    prompt = FORMATS["instruction"](tokenizer, {"architectures": ["MistralForCausalLM"]}).format(chat(*turns))
    reference = MistralTokenizer.v3(is_tekken=True)
    tekken = reference.decode(encoded(reference, turns), special_token_policy=SpecialTokenPolicy.KEEP)
    assert prompt.text == tekken.replace("<s>", tokenizer.bos_token).replace("</s>", tokenizer.eos_token)


ARGUMENTS = st.sampled_from([None, "", "{}", '{"a": 1}', {"a": 1}, "[]", "null", '{"a": "x', "nonsense"])
IDS = st.sampled_from([None, "", "c1", "c2", "c3"])
CALLS = st.fixed_dictionaries(
    {"id": IDS, "function": st.fixed_dictionaries({"name": st.sampled_from(["add", "sub"]), "arguments": ARGUMENTS})}
)
TEXTS = st.sampled_from([None, "", "x"])
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user"]), "content": TEXTS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXTS},
        optional={"tool_calls": st.lists(CALLS, max_size=3), "reasoning_content": TEXTS},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXTS}, optional={"tool_call_id": IDS}),
)
HISTORIES = {
    "chatml": CHATML,
    "no system": NO_SYSTEM,
    "system dropped": WITHOUT_SYSTEM,
    "strict": STRICT,
    "native": NATIVE,
    "native, strict": PAIRED + NATIVE,
    "text arguments": NATIVE_TEXT,
    "one call": NATIVE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
    "no text beside calls": NATIVE.replace("+ m.content }}", "+ ('' if m.tool_calls else m.content) }}"),
}


@pytest.fixture(scope="module", params=HISTORIES)
def historian(request, tmp_path_factory):
    """Formats of both types of model, for a template with one property."""
    tokenizer = load_tokenizer(tiny_llama(tmp_path_factory.mktemp("history"), template=HISTORIES[request.param]))
    return [kind(tokenizer, {}) for kind in FORMATS.values()]


def numbered(messages):
    """The messages with texts that differ."""
    return [m | {"content": m["content"] and f"<{n}>"} for n, m in enumerate(messages)]


@given(messages=st.lists(MESSAGES, min_size=1, max_size=8), has_tools=st.booleans())
def test_any_history_is_rendered_with_all_its_texts(historian, messages, has_tools):
    messages = numbered(messages)
    for format_ in historian:
        text = format_.format(chat_prompt(messages, [TOOL] if has_tools else [])).text
        for message in messages:
            assert (message["content"] or "") in text
            for call in message.get("tool_calls") or []:
                assert call["function"]["name"] in text


@given(messages=st.lists(MESSAGES, min_size=2, max_size=8), cut=st.integers(1, 7))
def test_earlier_messages_are_rendered_the_same_when_later_ones_arrive(historian, messages, cut):
    """Up to the last message, to which a later one may be joined."""
    messages = numbered(messages)
    earlier = messages[:cut]
    settled = [m["content"] for m in earlier[:-1] if m["content"]]
    for format_ in historian:
        before, after = (format_.format(chat_prompt(each)).text for each in (earlier, messages))
        end = before.index(settled[-1]) if settled else 0
        assert after.startswith(before[:end])


TURNS = st.lists(st.tuples(st.sampled_from(ROLES), st.text("xyz", min_size=1, max_size=3)), min_size=1, max_size=7)


@given(TURNS, st.booleans())
def test_strict_turns_alternate_and_lose_no_text(turns, has_system):
    messages = write_plain(name_developer_system(admit(chat(*turns))))
    strict = arrange(messages, StrictTable(has_system, takes_text_beside_calls=True))
    roles = [turn.role for turn in strict]
    assert re.fullmatch("(system )?(user assistant )*user", " ".join(roles))
    assert has_system or "system" not in roles
    words = "\n\n".join(turn.text for turn in strict).split()
    assert [word for word in words if set(word) <= set("xyz")] == [content for _, content in turns]
