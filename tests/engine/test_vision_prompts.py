"""Prompts of models that see, beside tools and thinking: what mlx-vlm shows of the same messages, and its answers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message, Reasoning, Text, Tool, ToolCall, ToolResult
from mlxserver.engine.platform import device
from mlxserver.engine.prompt.images import RESULT_IMAGES
from mlxserver.engine.requests import ChatPrompt, GenerationRequest, ToolChoice
from mlxserver.engine.runners.builder import Builder
from tests.support.vision_models import TOKENS, Reference, answers, attached
from tools.harness.vision_models import picture, tiny_vision

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a CPU computes float32, which can be compared")

RED, BLUE = attached(picture(1)), attached(picture(2, 32, 64))
LOOK = Tool("look", "Looks.", {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]})
# In the manner of Qwen's: tools in a system message, calls in tags, results in a user's message, thinking that a
# variable switches off.
_SHOWN = """\
{%- macro shown(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
RESULT
</tool_response>{% else -%}
{%- if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif -%}
{{ shown(message.content) }}{% endif -%}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif -%}"""
TEMPLATES = {
    "images in results": _SHOWN.replace("RESULT", "{{ shown(message.content) }}"),
    "text in results": _SHOWN.replace("RESULT", "{{ message.content }}"),
}


def model_of(path, family, template):
    tiny_vision(path, family)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return SimpleNamespace(
        reference=Reference(path),
        runner=Builder(0.25).build(ModelSpec("m", str(path), type="thinking", prefix_cache_bytes=0)),
    )


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def model(request, tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("v") / request.param, request.param, TEMPLATES["images in results"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model whose template has no place for an image in a result."""
    return model_of(tmp_path_factory.mktemp("v") / "plain", "qwen3_vl", TEMPLATES["text in results"])


def request_of(*messages, tools=(), **variables):
    prompt = ChatPrompt(tuple(messages), tuple(tools), variables)
    return GenerationRequest(prompt, {"temperature": 0.0}, max_tokens=TOKENS, ignore_eos=True)


QUESTION = Message("user", (RED, Text("What is this?")), "messages[0]")
CALL = Message("assistant", (ToolCall("call_1", "look", {"at": "it"}),), "messages[1]")
RESULT = Message("tool", (ToolResult("call_1", "seen", "look", (BLUE,)),), "messages[2]")
THOUGHT = Message("assistant", (Reasoning("A picture."), Text("It is red.")), "messages[1]")
AGAIN = Message("user", (Text("And this?"), BLUE), "messages[2]")


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [(), (LOOK,)])
def test_tools_and_thinking_beside_images_are_prompted_as_by_mlx_vlm(model, tools, variables):
    requests = [
        request_of(QUESTION, tools=tools, **variables),
        request_of(QUESTION, CALL, RESULT, tools=tools, **variables),
        request_of(QUESTION, CALL, replace(RESULT, parts=(ToolResult("call_1", "seen", "look"),)), AGAIN, tools=tools),
    ]
    expected = [model.reference.answer(each) for each in requests]
    assert len({tuple(tokens) for tokens, _ in expected}) > 1
    formatted = [model.runner.preprocess(each).formatted for each in requests]
    assert [len(each.tokens) for each in formatted] == [length for _, length in expected]
    assert [each.opens_thinking for each in formatted[:2]] == [variables.get("enable_thinking", True)] * 2
    assert answers(model.runner, requests)[0] == [tokens for tokens, _ in expected]


def test_an_image_in_a_result_is_shown_there_and_each_sees_its_own(model):
    twice = Message("assistant", (CALL.parts[0], ToolCall("call_2", "look", {"at": "that"})), "messages[1]")
    other = Message("tool", (ToolResult("call_2", "too", "look", (RED,)),), "messages[3]")
    request = request_of(QUESTION, twice, RESULT, other, tools=(LOOK,))
    formatted = model.runner.preprocess(request).formatted
    assert RESULT_IMAGES not in formatted.text
    assert formatted.text.index("seen<|vision_start|>") < formatted.text.index("too<|vision_start|>")
    red, blue, last = (placed.image.key for placed in formatted.images)
    assert red == last != blue
    assert answers(model.runner, [request])[0] == [model.reference.answer(request)[0]]


def test_a_template_without_a_place_for_it_has_a_results_image_behind_the_result(plain):
    shown = Message("user", (Text(RESULT_IMAGES), BLUE), "messages[2]")
    text = replace(RESULT, parts=(ToolResult("call_1", "seen", "look"),))
    given, written = (
        plain.runner.preprocess(request_of(QUESTION, CALL, *behind, tools=(LOOK,))).formatted
        for behind in ((RESULT,), (text, shown))
    )
    assert given.tokens == written.tokens
    assert len(given.images) == 2


def test_reasoning_of_an_earlier_turn_stays_beside_its_image(model):
    formatted = model.runner.preprocess(request_of(QUESTION, THOUGHT, AGAIN)).formatted
    assert "<think>\nA picture.\n</think>\n\nIt is red." in formatted.text
    assert len(formatted.images) == 2


def test_a_tool_that_may_not_be_called_is_not_shown_beside_an_image(model):
    request = replace(request_of(QUESTION, tools=(LOOK,)), tool_choice=ToolChoice("none"))
    assert answers(model.runner, [request])[0] == [model.reference.answer(request_of(QUESTION))[0]]
