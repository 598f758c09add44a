"""Tools and calls stand in the prompt as the model's own template and format have them."""

import json

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlxserver.engine.conversation import Tool
from mlxserver.engine.events import Finish
from mlxserver.engine.output.native_formats import DEEPSEEK, HARMONY, PYTHONIC, QWEN_XML
from mlxserver.engine.output.stream import OutputStream
from mlxserver.engine.output.tool_calls import ToolCallParser
from mlxserver.engine.prompt.formats import FORMATS
from tests.support.conversations import chat_prompt
from tools.harness.models import CHATML, scripted_model, tiny_llama

USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "function": {"name": "add", "arguments": '{"a": 1, "s": "x\\ny", "b": true}'}}],
}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "call_1"}
ARGUMENTS = {"a": 1, "s": "x\ny", "b": True}

SHOWN = "{% if tools %}{{ '<|tool_list_start|>' + (tools | tojson) }}{% endif %}" + CHATML
CALLED = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<result>' + m.content }}"
    "{% elif m.tool_calls %}{% for call in m.tool_calls %}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' "
    "+ call.function.name + '<｜tool▁sep｜>' + call.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"
)
QUEUE = (
    "{% set queue = namespace(ids=[]) %}{{ tools | tojson }}{% for m in messages %}"
    "{%- if m.tool_calls -%}{%- for call in m.tool_calls -%}{%- set made = 'functions.' + call.function.name + ':7' -%}"
    "{%- set _ = queue.ids.append(made) -%}<|tool_calls_section_begin|>{{ made }}{{ call.function.arguments | tojson }}"
    "{%- endfor -%}{%- elif m.role == 'tool' -%}{%- set own = queue.ids.pop(0) -%}{{ own }}={{ m.content }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{% endfor %}"
)


@pytest.fixture
def format_with(tmp_path):
    """The prompt format of the tiny llama with another chat template."""
    return lambda template: FORMATS["instruction"](load_tokenizer(tiny_llama(tmp_path, template=template)), {})


def test_a_template_that_shows_tools_alone_gets_calls_as_the_model_writes_them(format_with):
    format_ = format_with(SHOWN)
    text = format_.format(chat_prompt([USER, CALL, RESULT], tools=[TOOL])).text
    assert format_.tool_format == PYTHONIC
    assert text.startswith("<|tool_list_start|>") and "You can call functions" not in text
    call = '<|tool_call_start|>[add(a=1, s="x\\ny", b=True)]<|tool_call_end|>'
    assert f"assistant\n{call}<|im_end|>\n<|im_start|>tool\n3<|im_end|>" in text
    assert read_back(PYTHONIC, call) == ARGUMENTS


def test_a_template_that_shows_calls_alone_gets_tools_described_in_the_models_format(format_with):
    format_ = format_with(CALLED)
    text = format_.format(chat_prompt([USER, CALL, RESULT], tools=[TOOL])).text
    assert format_.tool_format == DEEPSEEK
    example = DEEPSEEK.write("function_name", {"argument": "value"})
    assert example in text and json.dumps(TOOL["function"]) in text
    assert "<｜tool▁call▁begin｜>add<｜tool▁sep｜>" in text and "<result>3" in text
    assert read_back(DEEPSEEK, DEEPSEEK.write("add", ARGUMENTS)) == ARGUMENTS


def test_the_reasoning_between_calls_is_kept_where_results_are_the_users_text(tmp_path):
    """A template drops the reasoning before the last message of the user."""
    shows = "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    template = "{% for m in messages %}{{ m.role + ':' }}" + shows + "{{ m.content }};{% endfor %}"
    format_ = FORMATS["thinking"](load_tokenizer(tiny_llama(tmp_path, template=template)), {})
    earlier, now = ({**CALL, "reasoning_content": text} for text in ("Earlier.", "I must add."))
    text = format_.format(chat_prompt([USER, earlier, RESULT, USER, now, RESULT], tools=[TOOL])).text
    assert "assistant:I must add.\n<tool_call>" in text and "Earlier" not in text


def test_a_template_that_changes_lists_is_rendered(format_with):
    """Kimi K2's queues the ids of calls in a list, which transformers' sandbox refuses."""
    format_ = format_with(QUEUE)
    text = format_.format(chat_prompt([USER, CALL, RESULT], tools=[TOOL])).text
    assert (format_.tool_format.name, format_.tool_format.is_native) == ("kimi_k2", True)
    assert "<|tool_calls_section_begin|>functions.add:7{" in text and text.endswith("functions.add:7=3")


def test_harmony_is_a_format_of_its_own_and_its_content_has_no_calls(format_with):
    template = "{{ tools | tojson }}" + CALLED.replace("<｜tool▁calls▁begin｜>", "<|channel|><|call|>")
    assert format_with(template).tool_format == HARMONY
    parser = ToolCallParser(HARMONY)
    text = "Say <|channel|>commentary to=f"
    events = [*parser.feed(text), *parser.flush(is_cut=False)]
    assert "".join(event.text for event in events) == text


def test_an_id_of_nine_letters_is_kept(format_with):
    template = SHOWN.replace("<|tool_list_start|>", "[TOOL_CALLS]")
    ids = "{% for m in messages %}{% for call in m.tool_calls or [] %}{% if call.id | length != 9 %}"
    ids += "{{ raise_exception('nine!') }}{% endif %}{{ call.id + call.function.name + call.function.arguments.values()"
    ids += " | join }}{% endfor %}{% endfor %}"
    call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": "aB3456789"}]}
    messages = [USER, call, {**RESULT, "tool_call_id": "aB3456789"}]
    assert "aB3456789add" in format_with(template + ids).format(chat_prompt(messages, tools=[TOOL])).text


def read_back(tool_format, text):
    parser = ToolCallParser(tool_format)
    events = [*parser.feed(text), *parser.flush(is_cut=False)]
    return json.loads("".join(event.arguments for event in events))


XML = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{% for key, value in call.function.arguments.items() %}"
    "{{ '<parameter=' + key + '>\n' + value | string + '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}{% endfor %}"
)
NOTE = Tool(
    "note",
    parameters={
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "size": {"type": "number"},
            "title": {"type": ["string", "null"]},
            "text": {"type": "string"},
        },
    },
)


@pytest.mark.parametrize(
    ("key", "written", "value", "least_pieces"),
    [
        ("id", "1234567890123456789", 1234567890123456789, 1),
        ("size", "9007199254740993", 9007199254740993, 1),
        ("title", "123", "123", 1),
        ("title", '{"a": 1}', '{"a": 1}', 1),
        ("text", "null", "null", 1),
        ("text", "a\nb", "a\nb", 2),
        ("text", " ".join(f"word{n}" for n in range(120)), " ".join(f"word{n}" for n in range(120)), 100),
    ],
)
def test_a_model_with_calls_in_xml_calls_with_the_values_that_it_wrote(tmp_path, key, written, value, least_pieces):
    """From its tokens to the events of its answer, piece by piece."""
    script = f"<tool_call>\n<function=note>\n<parameter={key}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    path = scripted_model(tmp_path, {"go": script})
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = XML
    format_ = FORMATS["instruction"](tokenizer, {})
    assert format_.tool_format == QWEN_XML
    parser = ToolCallParser(format_.tool_format, [NOTE])
    stream = OutputStream(tokenizer, eos=tokenizer.eos_token_ids, max_tokens=999, tools=parser)
    tokens = [*tokenizer.encode(script, add_special_tokens=False), tokenizer.eos_token_id]
    *pieces, finish = [event for token in tokens for event in stream.feed(token)]
    assert (pieces[0].name, finish) == ("note", Finish("tool_calls"))
    assert json.loads("".join(piece.arguments for piece in pieces)) == {key: value}
    assert len(pieces) >= least_pieces
