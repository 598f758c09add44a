"""Messages become the prompt that the model was trained on, or are refused by name."""

import json
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
from mlxserver.engine.prompt.formats import FORMATS, FormattedPrompt, find_type
from mlxserver.engine.prompt.turns import admit, alternate, fold_system
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


def test_a_thinking_model_gets_the_messages_as_they_are(tiny_tokenizer):
    turns = [("assistant", "a"), ("user", "b"), ("user", "c"), ("system", "d")]
    assert FORMATS["thinking"](tiny_tokenizer, {}).format(chat(*turns)).text == chatml(*turns)


def test_reasoning_in_the_history_reaches_the_template(tokenizer_with):
    template = "{% for m in messages %}{{ m.reasoning_content or '' }}|{{ m.content }};{% endfor %}"
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    prompt = FORMATS["thinking"](tokenizer_with(template), {}).format(chat_prompt([answer]))
    assert prompt.text == "2+2|4;"


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


def test_a_switch_that_the_template_lacks_is_not_taken_for_one_that_it_has(tokenizer_with):
    off, free = chat(("user", "a"), template_kwargs={"enable_thinking": False}), chat(("user", "a"))
    without, switched = (FORMATS["thinking"](tokenizer_with(template), {}) for template in (OPENING, SWITCHED))
    assert (without.must_not_think(off), without.must_not_think(free)) == (True, False)
    assert not switched.must_not_think(off)


@pytest.mark.parametrize(
    ("kind", "name", "value", "param"),
    [
        ("instruction", "enable_thinking", True, "prompt.template_kwargs"),
        ("instruction", "reasoning_effort", "high", "prompt.template_kwargs.reasoning_effort"),
        ("thinking", "reasoning_effort", "low", "prompt.template_kwargs.reasoning_effort"),
        ("thinking", "no_such_variable", 1, "prompt.template_kwargs"),
    ],
)
def test_a_variable_that_would_change_nothing_is_refused(tiny_tokenizer, kind, name, value, param):
    refusal = rejection(FORMATS[kind](tiny_tokenizer, {}), chat(("user", "a"), template_kwargs={name: value}))
    assert refusal.param == param


def test_a_variable_that_the_template_has_reaches_it(tokenizer_with):
    tokenizer = tokenizer_with(CHATML + "{{ reasoning_effort }}")
    asked = chat(("user", "a"), template_kwargs={"reasoning_effort": "low"})
    assert FORMATS["instruction"](tokenizer, {}).format(asked).text.endswith("low")


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


@pytest.mark.parametrize(
    ("turns", "rendered"),
    [
        ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
        ([("system", "a"), ("developer", "b"), ("user", "c")], [("system", "a\n\nb"), ("user", "c")]),
        ([("user", "a"), ("assistant", None), ("assistant", "b"), ("user", "c")], None),
        ([("user", "a"), ("system", "b"), ("user", "c")], [("user", "a\n\nb\n\nc")]),
        (
            [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")],
            [("user", "a"), ("assistant", "b"), ("user", "c\n\nd")],
        ),
    ],
)
def test_an_instruction_model_gets_strict_turns(tiny_tokenizer, turns, rendered):
    rendered = rendered or [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert FORMATS["instruction"](tiny_tokenizer, {}).format(chat(*turns)).text == chatml(*rendered)


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


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([("assistant", "a"), ("user", "b")], "messages[0].role"),
        ([("system", "a"), ("system", "b"), ("assistant", "c")], "messages[2].role"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[2].role"),
        ([("system", "a")], "messages[0].role"),
        ([("user", "a"), RESULT], "messages[1].role"),
        ([("user", "a"), CALL, ("user", "b")], "messages[2].role"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_what_cant_be_put_right_is_refused_by_its_own_index(tokenizer_with, messages, param, template):
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    refused = rejection(FORMATS["instruction"](tokenizer_with(template), {}), chat_prompt(messages))
    assert refused.param == param


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_a_conversation_has_messages(tiny_tokenizer, kind):
    assert rejection(FORMATS[kind](tiny_tokenizer, {}), ChatPrompt(())).param == "prompt.conversation"


def test_messages_that_are_joined_lose_neither_reasoning_nor_calls(tokenizer_with):
    template = NATIVE.replace("m.content }}", "(m.reasoning_content or '') + '|' + m.content }}")
    thought = [{"role": "assistant", "content": text, "reasoning_content": text.upper()} for text in "bc"]
    prompt = chat_prompt([USER, *thought, CALL, RESULT])
    text = FORMATS["instruction"](tokenizer_with(template), {}).format(prompt).text
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


TURNS = st.lists(st.tuples(st.sampled_from(ROLES), st.text("xyz", min_size=1, max_size=3)), min_size=1, max_size=7)


@given(TURNS, st.booleans())
def test_strict_turns_lose_no_text_or_name_the_message(turns, has_system):
    messages = admit(chat(*turns))
    try:
        strict = alternate(messages) if has_system else fold_system(alternate(messages))
    except PromptRejected as refused:
        assert int(re.fullmatch(r"messages\[(\d+)\]\.role", refused.param)[1]) < len(turns)
        return
    roles = [turn.role for turn in strict]
    assert re.fullmatch("(system )?(user assistant )*user", " ".join(roles))
    assert has_system or "system" not in roles
    assert "\n\n".join(turn.text for turn in strict) == "\n\n".join(content for _, content in turns)
