"""Grammars of answers in harmony's channels: strict and forced calls, and calls beside a schema, as messages."""

import itertools
from functools import partial

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import AddedToken

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Tool
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import GenerationRequest, ToolChoice
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.sampling.channel_grammars import answer_messages, forced_messages, strict_messages
from mlxserver.engine.sampling.grammars import Grammars
from tests.support.conversations import question
from tests.support.field_models import CHANNELS
from tests.support.grammars import admits as grammar_admits
from tools.harness.models import write_scripted
from tools.harness.scripts import words

ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
NEXT = "<|end|><|start|>assistant"
NOTE = f"<|channel|>analysis<|message|>Let me see: {{1}}.{NEXT}"
SAY = "<|channel|>commentary<|message|>One moment."
FINAL = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{{"a": {}}}'


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path):
    loaded = load_tokenizer(tiny_llama_path)
    loaded.backend_tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CHANNELS])
    ends = loaded.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    loaded.eos_token_ids = {*loaded.eos_token_ids, *ends}
    return loaded


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.backend_tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def admits(grammars, tokenizer):
    return partial(grammar_admits, grammars, tokenizer)


def tool(name="add", strict=None):
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    return Tool(name, None, parameters, strict, "tools[0].function")


CALLS = [  # as models write them
    CALL.format("add", 1),
    '<|channel|>commentary to=functions.add<|message|>{"a": 1}',
    '<|channel|>commentary to=functions.add json<|message|>\n{"a":1}\n',
    '<|channel|>commentary to=functions.add code<|message|>{"a": 1}',
    ' to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 1}',
    ' to=functions.add<|channel|>commentary<|message|>{\n  "a": 1\n}',
]


@pytest.mark.parametrize("call", CALLS)
def test_strict_arguments_keep_their_schema_in_their_channel(grammars, admits, call):
    grammar = strict_messages([tool(strict=True), tool("free")], grammars)
    for before in ("", NOTE, NOTE + NOTE, f"{NOTE}{SAY}{NEXT}", f"<|start|>assistant{NOTE}"):
        assert admits(grammar, before + call), before
        assert admits(grammar, f"{before}{call}{NEXT}{call}<|end|>"), before
        assert admits(grammar, before + call.replace(".add", ".free").replace('"a"', '"b"')), before
        for unfit in ('"one"', "1.5", "null"):
            assert not admits(grammar, before + call.replace("1", unfit)), unfit
        assert not admits(grammar, before + call.replace('"a"', '"b"')), before
        assert not admits(grammar, before + call.replace(".add", ".other")), before
        assert not admits(grammar, f"{before}{call} words"), before


def test_a_strict_tool_leaves_all_other_messages_free(grammars, admits):
    grammar = strict_messages([tool(strict=True)], grammars)
    for text in (
        f"{FINAL}Words, and {{1}}.",
        f"{NOTE}{FINAL}",
        f"{NOTE}{SAY}",
        f"{SAY}<|end|>",
        NOTE.removesuffix(NEXT),
    ):
        assert admits(grammar, text), text
    assert strict_messages([tool()], grammars) is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "choice", [ToolChoice("required"), ToolChoice("function", "add"), ToolChoice("required", parallel=False)]
)
def test_forced_calls_are_messages_behind_the_reasoning(grammars, admits, call, choice):
    grammar = forced_messages([tool(), tool("other")], choice, grammars)
    other = call.replace(".add", ".other")
    assert admits(grammar, call) and admits(grammar, NOTE + call)
    assert admits(grammar, other) == (choice.mode == "required")
    assert admits(grammar, f"{call}{NEXT}{other}") == (choice == ToolChoice("required"))
    for text in (
        call.replace("1", "{}"),
        f"{FINAL}Words.",
        f"{NOTE}{SAY}{NEXT}{call}",
        f"{call}{NEXT}{call}{NEXT}{call}",
    ):
        assert not admits(grammar, text), text


@pytest.mark.parametrize("tools", [(), (tool(),), (tool(strict=True),)], ids=["none", "free", "strict"])
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_with_a_schema_is_final_and_calls_may_take_its_place(grammars, admits, tools, parallel):
    choice = ToolChoice(parallel=parallel)
    grammar = answer_messages(tools, choice, grammars, schema=ANSWER, param="format.schema")
    answer, call = FINAL + '{"n": 1}', CALL.format("add", 1)
    for text in (answer, NOTE + answer, '<|channel|>final <|constrain|>json<|message|>{"n": 1}'):
        assert admits(grammar, text), text
    for text in (FINAL, f"{FINAL}words", f"{answer} words", FINAL + '{"m": 1}', SAY, f"{SAY}{NEXT}{answer}"):
        assert not admits(grammar, text), text
    assert admits(grammar, NOTE + call) == bool(tools)
    assert admits(grammar, f"{call}{NEXT}{call}") == (bool(tools) and parallel)
    is_strict = bool(tools) and bool(tools[0].strict)
    assert admits(grammar, CALL.format("add", '"one"')) == (bool(tools) and not is_strict)


def test_any_end_of_sequence_ends_a_call(grammars, tokenizer):
    matcher = grammars.compile(forced_messages([tool()], ToolChoice("required"), grammars)).deep_copy()
    tokens = tokenizer.backend_tokenizer.encode(CALL.format("add", 1), add_special_tokens=False).ids
    assert matcher.consume_tokens(tokens)
    mask = matcher.compute_bitmask()
    assert all(mask[end // 8] >> end % 8 & 1 for end in tokenizer.eos_token_ids)


def test_what_can_not_be_enforced_is_refused_with_its_path(grammars):
    made = Tool("mail", None, {"type": "object", "not": {}}, True, "tools[3].function")
    with pytest.raises(PromptRejected) as refused:
        strict_messages([made], grammars)
    assert refused.value.param == "tools[3].function.parameters.not"


@pytest.mark.parametrize(
    ("prompt", "goes_on"),
    [
        ("<|start|>user<|message|>Hi<|end|><|start|>assistant", CALL.format("add", 1)),
        ("<|start|>assistant<|channel|>analysis<|message|>", f"I call.{NEXT}{CALL.format('add', 1)}"),
        (f"<|start|>assistant{CALL.format('add', 1)[:-3]}", " 1}"),
    ],
)
def test_a_grammar_goes_on_from_what_the_prompt_has_begun(grammars, tokenizer, prompt, goes_on):
    grammar = forced_messages([tool()], ToolChoice("required"), grammars)
    ids = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, goes_on)]
    start = len(ids[0]) - 1 - ids[0][::-1].index(tokenizer.convert_tokens_to_ids("<|start|>"))
    constraint = grammars.constraint(grammar, ids[0][start:])
    for token in ids[1]:
        assert constraint.allowed()[token // 8] >> token % 8 & 1, token
        constraint.accept(token)


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = write_scripted(tmp_path_factory.mktemp("channels"), [words("a")], TEMPLATE, tokens=CHANNELS)
    runner = Builder(0.25).build(ModelSpec("channels", str(path)))
    yield runner
    runner.batch.close()


def refused(runner, text, **options):
    """The part of a text that the constraint of a request does not allow."""
    described = {"type": "function", "function": {**tool(strict=True).function, "strict": options.pop("strict", None)}}
    ((sequence, _),) = runner.prepare(GenerationRequest(question("hi", [described]), **options), itertools.count())
    tokens = runner.tokenizer.encode(text, add_special_tokens=False)
    for number, token in enumerate(tokens):
        mask = sequence.constraint.allowed()
        if mask and not mask[token // 8] >> token % 8 & 1:
            return runner.tokenizer.decode(tokens[number:])
        sequence.constraint.accept(token)
    return ""


def test_an_answer_goes_on_from_the_header_that_the_template_has_begun(runner):
    forced = {"tool_choice": ToolChoice("required")}
    call = CALL.format("add", 1)
    for options in (forced, {"strict": True}):
        assert refused(runner, call, **options) == refused(runner, NOTE + call, **options) == ""
        assert refused(runner, f"<|start|>assistant{call}", **options)
        assert refused(runner, CALL.format("add", '"one"'), **options)[0] == '"'
    assert refused(runner, f"{FINAL}Hi", **forced) == "final<|message|>Hi"
    assert refused(runner, f"{FINAL}Hi", strict=True) == ""


@pytest.mark.parametrize("options", [{"tool_choice": ToolChoice("required")}, {"strict": True}], ids=str)
def test_a_budget_closes_the_reasoning_before_a_call(runner, options):
    note, call = "<|channel|>analysis<|message|>", CALL.format("add", 1)
    assert refused(runner, f"{note}ab{NEXT}{call}", thinking_budget=2, **options) == ""
    assert refused(runner, f"{note}abc{NEXT}{call}", thinking_budget=2, **options).startswith("c<|end|>")
