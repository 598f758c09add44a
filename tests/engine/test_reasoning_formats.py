"""Every family's marks are found, split in any cut, closed by a budget, and followed by what a grammar allows."""

import itertools
import json
from contextlib import contextmanager
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.events import Delta, Finish, ToolCallDelta
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.reasoning_formats import FORMATS, find_format, turn_ends
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.requests import GenerationRequest, JsonFormat, ToolChoice
from mlxserver.engine.runners.builder import Builder
from tests.support.conversations import question
from tools.harness.models import CHATML, scripted_model, tiny_llama

HARMONY_ANSWER = "<|start|>assistant<|channel|>final<|message|>Yes"

# What a model of each family writes behind its template's beginning of the answer; what of it is reasoning; content.
ANSWERS = {
    "<|channel|>analysis<|message|>": [
        (f"<|channel|>analysis<|message|>Well.<|end|>{HARMONY_ANSWER}", "Well.", "Yes"),
        ("<|channel|>final<|message|>Yes", "", "Yes"),
    ],
    " to=self<|message|>": [
        (" to=self<|message|>Well.<|eom|><|start|>assistant to=user<|message|>Yes<|eot|>", "Well.", "Yes"),
        (" to=user<|message|>Yes<|eot|>", "", "Yes"),
    ],
    "<|channel>thought": [
        ("<|channel>thought\nWell.\n<channel|>Yes", "Well.", "Yes"),
        ("<|channel>thought\n<channel|>Yes\n<channel|>", "", "Yes\n"),
        ("<|channel>thought\n<channel|>Yes<|channel>thought\n<channel|>", "", "Yes"),
        ("<|channel>thought\n<channel|>Yes<|channel>thought\n<channel|><channel|>", "", "Yes"),
        ("<|channel><|channel>thought\n<channel|>Yes", "", "Yes"),
        ("Yes<|channel>thought\nWell.\n<channel|>\nNo", "Well.", "YesNo"),
    ],
    "<|open|>think<|sep|>": [
        (
            "Well.<|close|>think<|sep|><|open|>response<|sep|>Yes<|close|>response<|sep|><|close|>message<|sep|>",
            "Well.",
            "Yes",
        ),
        ("<|open|>response<|sep|>Yes<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>", "", "Yes"),
    ],
    "<|START_THINKING|>": [
        ("<|START_THINKING|>Well.<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Well.", "Yes"),
        ("<|START_RESPONSE|>Yes<|END_RESPONSE|>", "", "Yes"),
        ("<|START_THINKING|><|END_THINKING|><|START_TEXT|>Yes<|END_TEXT|>", "", "Yes"),
    ],
    "<|inner_prefix|>": [("<|inner_prefix|>Well.<|inner_suffix|>Yes", "Well.", "Yes"), ("Yes", "", "Yes")],
    "<|think|>": [
        ("<|think|>Well.<|end|><|begin|>assistant<|content|>Yes<|end|>", "Well.", "Yes"),
        ("<|content|>Yes<|end|>", "", "Yes"),
        ("<|think|>Well.<|end|><|begin|>assistant<|tool_calls|>Yes", "Well.", "Yes"),
    ],
    "Here are my reasoning steps:": [
        ("Here are my reasoning steps:\nWell.\n[BEGIN FINAL RESPONSE]\nYes\n[END FINAL RESPONSE]\n", "Well.", "Yes\n"),
    ],
    "Here is my thought process:": [
        ("Here is my thought process: Well.\n\nHere is my response:\n\nYes", "Well.", "Yes"),
    ],
    "<seed:think>": [("<seed:think>\nWell.\n</seed:think>\nYes", "Well.", "Yes")],
    "<think:opensource>": [("<think:opensource>Well.</think:opensource>Yes", "Well.", "Yes")],
    "<mm:think>": [("<mm:think>Well.</mm:think>\n\nYes", "Well.", "Yes"), ("</mm:think>Yes", "", "Yes")],
    "<longcat_think>": [("<longcat_think>\nWell.\n</longcat_think>\nYes", "Well.", "Yes")],
    "<|think:start|>": [("<|think:start|>Well.<|think:end|>Yes", "Well.", "Yes")],
    "[THINK]": [("[THINK]Well.[/THINK]Yes", "Well.", "Yes")],
    "<think>": [
        ("<think>\nWell.\n</think>\n\n<response>Yes</response>\n", "Well.", "<response>Yes</response>\n"),
        ("<think>\nWell.\n</think>\n\n<think>\n\n</think>\n\nYes", "Well.", "Yes"),
        ("<think>\nWell.\n</think></think>\n\nYes </think>", "Well.", "Yes </think>"),
        ("</think>\n\nYes", "", "Yes"),
    ],
}  # fmt: skip


def parser_of(marks, starts_inside=False):
    if marks.channels:
        return ChannelParser(marks.channels, starts_inside)
    return ThinkingParser(marks, starts_inside)


def parse(marks, pieces, starts_inside=False):
    parser = parser_of(marks, starts_inside)
    emitted = [part for piece in pieces for part in parser.feed(piece)] + parser.flush()
    return tuple("".join(text.text for channel, text in emitted if channel == c) for c in ("reasoning", "content"))


def find(start):
    return next(marks for marks in reversed(FORMATS) if marks.start == start)


def test_every_family_has_an_example():
    assert ANSWERS.keys() == {marks.start for marks in FORMATS}


@pytest.mark.parametrize(
    ("start", "text", "reasoning", "content"),
    [(start, *example) for start, examples in ANSWERS.items() for example in examples],
)
def test_an_answer_of_each_family_is_split_in_every_cut(start, text, reasoning, content):
    marks = find(start)
    starts_inside = text.startswith("Well.")
    assert parse(marks, [text], starts_inside) == (reasoning, content)
    assert parse(marks, text, starts_inside) == (reasoning, content)
    for at in range(len(text)):
        assert parse(marks, [text[:at], text[at:]], starts_inside) == (reasoning, content)


def test_marks_of_the_answer_are_dropped_at_its_borders_only():
    granite = next(marks for marks in FORMATS if marks.closing == "</response>")
    for text, content in (
        ("<think>Well.</think><response>Yes</response>\n", "Yes"),
        ("<response>Yes</response> and <response>", "Yes</response> and <response>"),
    ):
        assert parse(granite, [text])[1] == parse(granite, text)[1] == content


@given(st.data())
def test_any_cut_of_any_familys_marks_gives_the_same(data):
    marks = data.draw(st.sampled_from(FORMATS))
    fragments = [
        marks.start,
        marks.end,
        *marks.dropped,
        *marks.answers,
        marks.closing or "a",
        " ",
        "\n",
        "a",
        "b c",
        "<|",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=10)))
    cuts = data.draw(st.lists(st.integers(0, 200)))
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    starts_inside = data.draw(st.booleans())
    pieces = [text[a:b] for a, b in pairwise(borders)]
    whole = parse(marks, [text], starts_inside)
    assert parse(marks, pieces, starts_inside) == parse(marks, text, starts_inside) == whole


@pytest.mark.parametrize("marks", FORMATS, ids=[f"{marks.start}{marks.closing}" for marks in FORMATS])
def test_a_format_is_found_by_its_template_or_its_tokens(tmp_path, marks):
    for number, text in enumerate(marks.template):
        comment = "{#" + text + "#}"
        assert find_format(load_tokenizer(tiny_llama(tmp_path / str(number), template=CHATML + comment))) == marks
    if marks.vocab:
        path = scripted_model(tmp_path / "tokens", {"x": "y"}, tokens=(*marks.vocab, *marks.turn_ends))
        tokenizer = load_tokenizer(path)
        assert find_format(tokenizer) == marks


def test_a_message_that_ends_does_not_end_the_turn(tmp_path):
    """Whatever the model's files say: the reasoning would be the whole answer."""
    for start, end in (
        ("<|channel|>analysis<|message|>", "<|end|>"),
        (" to=self<|message|>", "<|eom|>"),
        ("<|think|>", "<|end|>"),
    ):
        marks = find(start)
        tokens = tuple(dict.fromkeys((*marks.vocab, *marks.turn_ends, end)))
        tokenizer = load_tokenizer(scripted_model(tmp_path / start[:12].strip("<|>"), {"x": "y"}, tokens=tokens))
        known, own = tokenizer.eos_token_ids, {tokenizer.get_vocab()[token] for token in marks.turn_ends}
        assert turn_ends(tokenizer, {*known, tokenizer.get_vocab()[end]}) == known | own
    marks = find("<|channel>thought")
    tokenizer = load_tokenizer(scripted_model(tmp_path / "result", {"x": "y"}, tokens=(*marks.vocab, *marks.turn_ends)))
    assert turn_ends(tokenizer, {1}) == {1, tokenizer.get_vocab()["<|tool_response>"]}
    other = load_tokenizer(scripted_model(tmp_path / "other", {"x": "y"}))
    assert turn_ends(other, {1, 2}) == {1, 2}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 10**7}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
OPENED = {"<|channel|>analysis<|message|>": "<|start|>assistant", "<|open|>think<|sep|>": "<|open|>think<|sep|>"}
OPENED["<|think|>"] = "<|begin|>assistant"


@contextmanager
def random_model(tmp_path, start, more=""):
    """A runner of a model with random weights whose template has the marks of a family."""
    marks = find(start)
    opening = OPENED.get(start, "<|im_start|>assistant\n")
    template = CHATML.replace("<|im_start|>assistant\\n", opening) + "{#" + marks.template[-1] + more + "#}"
    path = tiny_llama(tmp_path / "model", template=template)
    runner = Builder(0.25).build(ModelSpec("tiny", str(path), context_length=2048))
    try:
        yield runner
    finally:
        runner.batch.close()


def generate(runner, request):
    """Reasoning, content, calls and the reason of the finish."""
    ((sequence, output),) = runner.prepare(request, itertools.count())
    runner.batch.insert([sequence])
    events = []
    while not (events and isinstance(events[-1], Finish)):
        runner.batch.prefill()
        for token in runner.batch.decode():
            events += output.feed(token)
    runner.batch.remove([sequence.id])
    texts = (
        "".join(e.text for e in events if isinstance(e, Delta) and e.channel == c) for c in ("reasoning", "content")
    )
    calls = "".join(e.arguments for e in events if isinstance(e, ToolCallDelta))
    return (*texts, calls, events[-1].reason)


KINDS = [
    "<|channel|>analysis<|message|>", " to=self<|message|>", "<|channel>thought", "<|open|>think<|sep|>", "<|think|>",
    "<|START_THINKING|>", "Here are my reasoning steps:", "<think>",
]  # fmt: skip


@pytest.mark.parametrize("start", KINDS)
def test_a_grammar_holds_behind_the_reasoning_which_a_budget_closes(tmp_path, start):
    with random_model(tmp_path, start) as runner:
        assert runner.facts.type == "thinking"
        for seed in range(2):
            options = {"thinking_budget": 12, "max_tokens": 600, "sampling": {"temperature": 1.0, "seed": seed}}
            asked = GenerationRequest(question("hello"), format=JsonFormat(CITY), **options)
            reasoning, content, _, reason = generate(runner, asked)
            assert reason == "stop"
            jsonschema.validate(json.loads(content), CITY)
            assert start not in reasoning
            forced = GenerationRequest(question("hello", [TOOL]), tool_choice=ToolChoice("required"), **options)
            _, content, arguments, reason = generate(runner, forced)
            assert (content, reason) == ("", "tool_calls")
            jsonschema.validate(json.loads(arguments), CITY)


def test_solars_strict_calls_come_in_a_message_of_their_own(tmp_path):
    tool = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    shown = "<|tool_call:begin|>#}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    shown += "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}{#"
    with random_model(tmp_path, "<|think|>", shown) as runner:
        for people, is_allowed in (("3", True), ('"three"', False)):
            ((sequence, _),) = runner.prepare(GenerationRequest(question("hello", [tool])), itertools.count())
            text = (
                "<|think|>Well.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>abc<|tool_call:name|>weather"
                f'<|tool_call:args|>{{"city": "Rome", "people": {people}}}<|tool_call:end|>'
            )
            for token in runner.tokenizer.encode(text, add_special_tokens=False):
                mask = sequence.constraint.allowed()
                if mask and not mask[token // 8] >> token % 8 & 1:
                    assert not is_allowed
                    break
                sequence.constraint.accept(token)
            else:
                assert is_allowed
