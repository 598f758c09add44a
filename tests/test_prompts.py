"""Messages become the prompt that the model was trained on, or are refused by name."""

import json
import re
import shutil
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer

from engine.errors import PromptRejected
from engine.messages import ROLES, admit, alternate
from engine.prompts import FORMATS, find_type, thinking_tags
from engine.types import ChatPrompt
from tests.models import CHATML, scripted_model, tiny_llama

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
DEAF = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
OPENING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
SWITCHED = CHATML.replace("assistant\n' }}", "assistant\n' }}{{ enable_thinking }}")


def chat(*turns, **fields):
    """A prompt of (role, content) turns."""
    return ChatPrompt([{"role": role, "content": content} for role, content in turns], **fields)


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
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    prompt = FORMATS["thinking"](tokenizer_with(template), {}).format(ChatPrompt([message]))
    assert prompt.text == "2+2|4;"


@pytest.mark.parametrize("kind", ["thinking", "instruction"])
def test_the_developer_speaks_as_the_system(tiny_tokenizer, kind):
    prompt = FORMATS[kind](tiny_tokenizer, {}).format(chat(("developer", "a"), ("user", "b")))
    assert prompt.text == chatml(("system", "a"), ("user", "b"))


def test_the_type_sets_the_switch_for_thinking_and_the_prompt_may_change_it(tokenizer_with):
    tokenizer = tokenizer_with(SWITCHED)
    told = [FORMATS[kind](tokenizer, {}).format(chat(("user", "a"))).text[-5:] for kind in ("thinking", "instruction")]
    assert told == ["\nTrue", "False"]
    asked = chat(("user", "a"), template_kwargs={"enable_thinking": False})
    assert FORMATS["thinking"](tokenizer, {}).format(asked).text.endswith("False")


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
        FORMATS["instruction"](tokenizer_with(DEAF), {}).format(chat(*turns)).text == "user:a\n\nb;assistant:c;user:d;"
    )


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([("assistant", "a"), ("user", "b")], "messages[0].role"),
        ([("system", "a"), ("system", "b"), ("assistant", "c")], "messages[2].role"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[2].role"),
        ([("system", "a")], "messages[0].role"),
        ([("user", "a"), ("robot", "b")], "messages[1].role"),
        ([("user", "a"), (["user"], "b")], "messages[1].role"),
        ([("user", [1])], "messages[0].content"),
        ([("user", "a"), RESULT], "messages[1].role"),
        ([("user", "a"), CALL, ("user", "b")], "messages[1].tool_calls"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_what_cant_be_put_right_is_refused_by_its_own_index(tokenizer_with, messages, param, template):
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    refused = rejection(FORMATS["instruction"](tokenizer_with(template), {}), ChatPrompt(messages))
    assert refused.param == param


def test_tools_go_to_a_template_that_has_a_place_for_them(tokenizer_with):
    tools = [{"type": "function", "function": {"name": "f"}}]
    user = {"role": "user", "content": "a"}
    format_ = FORMATS["instruction"](tokenizer_with(TOOLS), {})
    assert format_.format(ChatPrompt([user], tools=tools)).text == json.dumps(tools) + chatml(("user", "a"))
    turns = [("user", "a"), ("assistant", ""), ("tool", "3"), ("tool", "3")]
    assert format_.format(ChatPrompt([user, CALL, RESULT, RESULT])).text == chatml(*turns)
    assert rejection(format_, ChatPrompt([user, CALL, user])).param == "messages[2].role"
    assert rejection(format_, ChatPrompt([user, RESULT])).param == "messages[1].role"
    for kind in FORMATS.values():
        assert rejection(kind(tokenizer_with(CHATML), {}), ChatPrompt([user], tools=tools)).param == "tools"


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
def test_what_a_template_raises_is_a_refusal_in_its_own_words(tokenizer_with, template, words):
    for kind in FORMATS.values():
        assert words in str(rejection(kind(tokenizer_with(template), {}), chat(("user", "a"))))


def test_text_that_is_no_unicode_is_refused(tiny_tokenizer):
    refused = rejection(FORMATS["thinking"](tiny_tokenizer, {}), chat(("user", "a\ud800")))
    assert (refused.param, "lone surrogate at 1" in str(refused)) == ("messages[0].content", True)


def test_template_arguments_cant_replace_the_template(tiny_tokenizer):
    prompt = chat(("user", "a"), template_kwargs={"chat_template": "mine"})
    assert rejection(FORMATS["instruction"](tiny_tokenizer, {}), prompt).param == "chat_template_kwargs"


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
    prompt = FORMATS["instruction"](tokenizer, {"model_type": "mistral"}).format(chat(*turns))
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
    messages = admit(chat(*turns), has_tools=True)
    try:
        strict = alternate(messages, has_system=has_system)
    except PromptRejected as refused:
        assert int(re.fullmatch(r"messages\[(\d+)\]\.role", refused.param)[1]) < len(turns)
        return
    roles = [turn["role"] for turn in strict]
    assert re.fullmatch("(system )?(user assistant )*user", " ".join(roles))
    assert has_system or "system" not in roles
    assert "\n\n".join(turn["content"] for turn in strict) == "\n\n".join(content for _, content in turns)
