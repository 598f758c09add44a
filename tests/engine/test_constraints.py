"""Grammars and limits on real sequences: a model generates only what its constraint allows, whatever else runs."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import ContextExceeded, PromptRejected
from mlxserver.engine.events import Delta, Finish, ToolCallDelta
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.reasoning_formats import HARMONY, THINK
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.output.tool_formats import parsed_format
from mlxserver.engine.requests import (
    GenerationRequest,
    JsonFormat,
    TokenPrompt,
    ToolChoice,
)
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.sampling.constraints import MAX_CALL_TOKENS, Every, Restricted, ThinkingControl, mask_bytes
from mlxserver.engine.sampling.tool_grammars import strict_calls
from tests.support.conversations import question

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 10**7}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {**CITY, "properties": {**CITY["properties"]}}}}
    for name in ("weather", "clock")
]


@pytest.fixture(scope="module")
def tiny(tiny_llama_path):
    runner = Builder(0.25).build(ModelSpec("tiny", str(tiny_llama_path), type="instruction", context_length=2048))
    yield runner
    runner.batch.close()


def ask(text="hello there", tools=(), **options):
    options.setdefault("max_tokens", 300)
    options.setdefault("sampling", {"temperature": 1.0, "seed": 5})
    return GenerationRequest(question(text, tools), **options)


def generate(runner, *requests):
    """The events of every choice of every request, all in one batch."""
    ids, outputs = itertools.count(), {}
    for request in requests:
        choices = runner.prepare(request, ids)
        runner.batch.insert([sequence for sequence, _ in choices])
        outputs |= {sequence.id: (output, []) for sequence, output in choices}
    while not runner.batch.is_empty():
        finished = []
        for token in runner.batch.decode():
            output, events = outputs[token.sequence_id]
            events += output.feed(token)
            if isinstance(events[-1] if events else None, Finish):
                finished.append(token.sequence_id)
        runner.batch.remove(finished)
        runner.batch.prefill()
    return [events for _, events in outputs.values()]


def content(events, channel="content"):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.channel == channel)


@pytest.mark.parametrize("seed", range(6))
def test_a_schema_is_kept_by_a_model_of_random_weights_at_any_seed(tiny, seed):
    sampling = {"temperature": 1.0, "seed": seed}
    (events,) = generate(tiny, ask(format=JsonFormat(CITY), sampling=sampling))
    assert events[-1] == Finish("stop")
    jsonschema.validate(json.loads(content(events)), CITY)


def test_json_object_gives_an_object(tiny):
    (events,) = generate(tiny, ask(format=JsonFormat(), sampling={"temperature": 1.0, "seed": 3}))
    if events[-1] == Finish("stop"):
        assert isinstance(json.loads(content(events)), dict)
    assert content(events).startswith("{")


def test_constrained_and_free_sequences_share_a_batch_and_are_the_same_alone(tiny):
    free, bound = ask(max_tokens=20), ask(format=JsonFormat(CITY))
    alone = [generate(tiny, request)[0] for request in (free, bound, free)]
    assert generate(tiny, free, bound, free) == alone


def test_a_constraint_that_is_cut_by_max_tokens_finishes_with_length(tiny):
    (events,) = generate(tiny, ask(format=JsonFormat(CITY), max_tokens=4))
    assert events[-1] == Finish("length")


def test_an_impossible_schema_is_refused_with_the_reason(tiny):
    with pytest.raises(PromptRejected, match="JSON schema") as refusal:
        tiny.prepare(ask(format=JsonFormat({"type": "nonsense"})), itertools.count())
    assert refusal.value.param == "format.schema.type"


def test_a_grammar_that_fails_in_mid_answer_is_no_end_of_the_answer(tiny):
    ((sequence, _),) = tiny.prepare(ask(format=JsonFormat(CITY)), itertools.count())
    (token,) = tiny.tokenizer.encode("x", add_special_tokens=False)
    sequence.constraint.accept(token)
    with pytest.raises(PromptRejected, match="JSON schema"):
        sequence.constraint.allowed()


@pytest.mark.parametrize(("choice", "most"), [(ToolChoice("required"), 2), (ToolChoice("required", parallel=False), 1)])
def test_required_makes_calls_of_the_tools_given(tiny, choice, most):
    (events,) = generate(tiny, ask(tools=TOOLS, tool_choice=choice))
    assert events[-1] == Finish("tool_calls")
    pieces = [event for event in events if isinstance(event, ToolCallDelta)]
    calls = {piece.call for piece in pieces}
    assert 1 <= len(calls) <= most
    for call in calls:
        arguments = "".join(piece.arguments for piece in pieces if piece.call == call)
        jsonschema.validate(json.loads(arguments), CITY)
        assert {piece.name for piece in pieces if piece.call == call and piece.name} <= {"weather", "clock"}
    assert content(events) == ""


NODE = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    },
    "type": "object",
    "properties": {"first": {"$ref": "#/$defs/node"}},
    "required": ["first"],
    "additionalProperties": False,
}


def test_parameters_may_refer_to_their_own_definitions(tiny):
    tools = [*TOOLS, {"type": "function", "function": {"name": "link", "parameters": NODE}}]
    calls = '[{"name":"link","arguments":{"first":{"next":{"next":null}}}}]'
    assert accepted(tiny, ask(tools=tools, tool_choice=ToolChoice("required")), calls) == calls


STRICT = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]


def accepted(runner, request, text):
    """The beginning of a text that the constraint of a request allows, token by token."""
    ((sequence, _),) = runner.prepare(request, itertools.count())
    passed = []
    for token in runner.tokenizer.encode(text, add_special_tokens=False):
        if not bits(sequence.constraint.allowed())[token]:
            break
        sequence.constraint.accept(token)
        passed.append(token)
    return runner.tokenizer.decode(passed)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Just words, and <b>tags</b>.", "Just words, and <b>tags</b>."),
        ('So: <tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "people": 3}}\n</tool_call>\nand', None),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": 1',
            '<tool_call>{"name": "weather", "arguments": {"city": ',
        ),
        ('<tool_call>{"name": "clock", "arguments": {"any": [1]}}</tool_call>', None),
        ('<tool_call>{"name": "x', '<tool_call>{"name": "'),
        ("<tool_call>no", "<tool_call>"),
    ],
)
def test_a_strict_tool_constrains_the_body_of_a_call_and_nothing_else(tiny, text, passes):
    assert accepted(tiny, ask(tools=STRICT), text) == (passes or text)


def test_tools_without_a_strict_one_leave_the_answer_free(tiny):
    ((sequence, _),) = tiny.prepare(ask(tools=TOOLS), itertools.count())
    assert sequence.constraint is None


class NoControlTokens:
    """A vocabulary of text alone."""

    def split(self, text):
        return [text]

    def control_tokens(self):
        return []


def test_strict_leaves_calls_free_in_a_format_that_no_grammar_knows():
    """Agents send it with every tool: a refusal would end all of their work with such a model."""
    unknown = parsed_format("[CALL]", "", lambda body, tools: {})
    assert strict_calls(question("a", STRICT).tools, unknown, NoControlTokens()) is None


@pytest.mark.parametrize("budget", [0, 5])
def test_a_thinking_budget_binds_nothing_where_there_is_no_thinking(tiny, budget):
    """Clients send one to every model; one that does not think is within any."""
    ((sequence, _),) = tiny.prepare(ask(thinking_budget=budget), itertools.count())
    assert sequence.constraint is None


class Follower:
    """A ThinkingControl with a budget, and what it forces, piece by piece; a token is the number of a piece."""

    PIECES = ("<think>", "a", "</", "think>", "b", "\n</think>\n\n")

    def __init__(self, budget):
        parser = ThinkingParser(THINK, starts_inside=False)
        self.control = ThinkingControl(
            parser, self.PIECES.__getitem__, start=[0], end=[5], vocab_size=len(self.PIECES), budget=budget
        )

    def follow(self, *pieces):
        """The piece that is forced behind each piece; None where all are allowed."""
        forced = []
        for piece in pieces:
            self.control.accept(self.PIECES.index(piece))
            mask = self.control.allowed()
            forced.append(mask and "".join(self.PIECES[n] for n in np.flatnonzero(bits(mask))))
        return forced


def test_a_budget_that_is_spent_closes_the_reasoning():
    end = "\n</think>\n\n"
    assert Follower(2).follow("<think>", "a", "a", end, "b") == [None, None, end, None, None]
    assert Follower(0).follow("<think>", end, "b") == [end, None, None]
    assert Follower(2).follow("b", "b", "b") == [None] * 3


def test_a_closing_tag_that_the_model_has_begun_is_not_interrupted_by_another():
    end = "\n</think>\n\n"
    assert Follower(2).follow("<think>", "a", "</", "think>", "b") == [None] * 5
    assert Follower(2).follow("<think>", "a", "</", "b") == [None, None, None, end]


def test_a_forced_closing_tag_of_several_tokens_is_kept_from_the_grammar():
    received = []

    class Recording:
        accept = staticmethod(received.append)

        def allowed(self):
            return None

    pieces = ("<think>", "a", "\n", "</think>", "\n\n", "b")
    parser = ThinkingParser(THINK, starts_inside=False)
    control = ThinkingControl(
        parser, pieces.__getitem__, start=[0], end=[2, 3, 4], vocab_size=len(pieces), budget=1, inner=Recording()
    )
    for token, forced in enumerate([[], [2], [3], [4], [], []]):
        control.accept(token)
        assert [int(n) for n in np.flatnonzero(bits(control.allowed() or b""))] == forced
    assert received == [pieces.index("b")]


class Controlled:
    """A ThinkingControl of a format, and what it allows; a token is the number of a piece."""

    def __init__(self, pieces, parser, *, start=(), end=(), answers=((),), **options):
        self.pieces = pieces
        ids = {"start": self._ids(start), "end": self._ids(end), "answers": [self._ids(answer) for answer in answers]}
        ids["opened"] = self._ids(options.pop("opened", ()))
        self.control = ThinkingControl(parser, pieces.__getitem__, vocab_size=len(pieces), **ids, **options)

    def _ids(self, texts):
        return tuple(self.pieces.index(text) for text in texts)

    def allowed(self):
        """The pieces that may come next; None for any."""
        mask = self.control.allowed()
        return mask and [self.pieces[n] for n in np.flatnonzero(bits(mask)) if n < len(self.pieces)]

    def follow(self, *pieces):
        """What is allowed behind each piece."""
        return [(self.control.accept(self.pieces.index(piece)), self.allowed())[1] for piece in pieces]


CHANNELS = (
    "<|start|>",
    "assistant",
    "<|channel|>",
    "analysis",
    "commentary",
    "final",
    "<|message|>",
    "<|end|>",
    "a",
    "{",
)
HEADER = ("<|start|>", "assistant", "<|channel|>")
HARMONY_IDS = {
    "start": ("<|channel|>", "analysis", "<|message|>"),
    "end": ("<|end|>",),
    "answers": [(*HEADER, "final", "<|message|>"), (*HEADER, "commentary")],
}


TO_USER = {**HARMONY_IDS, "answers": HARMONY_IDS["answers"][:1]}


class OpenBrace:
    """An answer that begins with a brace."""

    def __init__(self):
        self.received = []

    def allowed(self):
        mask = bytearray(mask_bytes(len(CHANNELS)))
        mask[CHANNELS.index("{") // 8] |= 1 << CHANNELS.index("{") % 8
        return bytes(mask)

    def accept(self, token):
        self.received.append(CHANNELS[token])


def test_a_spent_budget_leads_from_the_analysis_to_another_channel():
    controlled = Controlled(CHANNELS, ChannelParser(HARMONY), budget=1, opened=HEADER[:2], **HARMONY_IDS)
    assert controlled.allowed() is None
    assert controlled.follow("<|channel|>", "analysis", "<|message|>", "a") == [None, None, None, ["<|end|>"]]
    assert controlled.follow("<|end|>", *HEADER) == [
        ["<|start|>"],
        ["assistant"],
        ["<|channel|>"],
        ["commentary", "final"],
    ]
    assert controlled.follow("commentary", "<|message|>", "a") == [None, None, None]
    assert controlled.follow("<|end|>", *HEADER, "analysis", "<|message|>")[-2:] == [None, ["<|end|>"]]


def test_a_grammar_holds_inside_the_final_channel():
    inner = OpenBrace()
    controlled = Controlled(CHANNELS, ChannelParser(HARMONY), inner=inner, opened=HEADER[:2], **TO_USER)
    assert controlled.allowed() == ["<|channel|>"]
    assert controlled.follow("<|channel|>", "analysis", "<|message|>", "a") == [
        ["analysis", "final"], ["<|message|>"], None, None,
    ]  # fmt: skip
    assert controlled.follow("<|end|>", *HEADER, "final") == [
        [*HEADER[:1]],
        ["assistant"],
        ["<|channel|>"],
        ["final"],
        ["<|message|>"],
    ]
    assert controlled.follow("<|message|>", "{") == [["{"], ["{"]]
    assert inner.received == ["{"]


def test_an_answer_may_begin_without_reasoning():
    inner = OpenBrace()
    controlled = Controlled(CHANNELS, ChannelParser(HARMONY), inner=inner, opened=HEADER[:2], **TO_USER)
    assert controlled.follow("<|channel|>", "final", "<|message|>", "{")[1:] == [["<|message|>"], ["{"], ["{"]]
    assert inner.received == ["{"]


def test_a_grammar_may_follow_the_reasoning_at_once_in_the_place_of_the_text_before_an_answer():
    """As where a call takes the place of an answer: its start tag is in the grammar."""
    pieces = ("[THINK]", "[/THINK]", "<|text|>", "<|call|>", "a", "b", "c", "d", "e", "{")
    marks = replace(THINK, start="[THINK]", end="[/THINK]", has_control_marks=True)
    for lead in ((), ("[THINK]", "a", "[/THINK]")):
        for written in (("<|text|>", "{"), ("{",)):
            inner = OpenBrace()
            controlled = Controlled(
                pieces, ThinkingParser(marks, starts_inside=False), inner=inner,
                start=("[THINK]",), end=("[/THINK]",), answers=(("<|text|>",), ()),
            )  # fmt: skip
            first = [controlled.allowed(), *controlled.follow(*lead)]
            assert first[-1] == (["<|text|>", "{"] if lead else ["[THINK]", "<|text|>", "{"])
            controlled.follow(*written)
            assert inner.received == ["{"]


def test_a_constraint_may_follow_each_beginning_of_an_answer():
    for kind in ("final", "commentary"):
        inner = OpenBrace()
        controlled = Controlled(CHANNELS, ChannelParser(HARMONY), inner=inner, opened=HEADER[:2], **HARMONY_IDS)
        assert controlled.follow("<|channel|>") == [["analysis", "commentary", "final"]]
        controlled.follow(kind, *["<|message|>"] * (kind == "final"), "{")
        assert inner.received == ["{"]


class Recorder:
    """A constraint that allows line breaks and a brace, and notes what it gets."""

    def __init__(self, pieces):
        self.pieces, self.received = pieces, []

    def allowed(self):
        mask = bytearray(mask_bytes(len(self.pieces)))
        for piece in ("\n", "{"):
            mask[0] |= 1 << self.pieces.index(piece)
        return bytes(mask)

    def accept(self, token):
        self.received.append(self.pieces[token])


def test_white_space_may_come_before_the_opening_mark():
    pieces = ("<think>", "a", "</think>", "\n", "{")
    for before in ([], ["\n"], ["\n", "\n"]):
        inner = Recorder(pieces)
        controlled = Controlled(
            pieces, ThinkingParser(THINK, False), start=("<think>",), end=("</think>",), inner=inner
        )
        assert controlled.follow(*before) == [["<think>", "\n", "{"]] * len(before)
        assert controlled.follow("<think>", "a", "</think>", "{") == [None, None, ["\n", "{"], ["\n", "{"]]
        inner = Recorder(pieces)
        controlled = Controlled(
            pieces, ThinkingParser(THINK, False), start=("<think>",), end=("</think>",), inner=inner
        )
        assert controlled.follow(*before, "{")[-1] == ["\n", "{"]
        assert inner.received == [*before, "{"]


CALLING = ("a", "<tool_call>", "</tool_call>", "\n</think>\n\n", "\n")


def test_a_spent_budget_waits_for_the_end_of_a_call():
    end = CALLING[3]
    options = {"call_starts": ("<tool_call>",), "call_end": "</tool_call>"}
    controlled = Controlled(CALLING, ThinkingParser(THINK, True, **options), end=(end,), budget=2)
    free = controlled.follow(
        "a", "<tool_call>", "a", "a", "a", "</tool_call>", "\n", "<tool_call>", "a", "</tool_call>"
    )
    assert free == [None] * 10
    assert controlled.follow("a", end) == [[end], None]  # it goes on thinking: the call was a draft


def test_a_spent_budget_does_not_wait_forever():
    end = CALLING[3]
    parser = ThinkingParser(THINK, True, call_starts=("<tool_call>",), call_end="</tool_call>")
    controlled = Controlled(CALLING, parser, end=(end,), budget=2)
    assert controlled.follow("<tool_call>", *["a"] * MAX_CALL_TOKENS)[-1] is None
    assert controlled.follow("a") == [[end]]


def test_no_prompt_has_a_token_that_the_model_has_not(tiny):
    runner = copy.copy(tiny)
    runner._vocab_size = 10  # a tokenizer may know more tokens than the model has embeddings
    for prompt, param in ((ask("hello there").prompt, "prompt.conversation"), (TokenPrompt((1, 10)), "prompt")):
        with pytest.raises(PromptRejected, match="no token") as refusal:
            runner.prepare(GenerationRequest(prompt), itertools.count())
        assert refusal.value.param == param


def test_a_prompt_longer_than_the_context_is_named_by_its_kind(tiny):
    prompts = ((question("word " * 3000), "prompt.conversation"), (TokenPrompt((5,) * 3000), "prompt"))
    for prompt, param in prompts:
        with pytest.raises(ContextExceeded) as refusal:
            tiny.prepare(GenerationRequest(prompt), itertools.count())
        assert refusal.value.param == param
        assert f"maximum context length is {tiny.facts.context_length} tokens" in str(refusal.value)


def test_what_is_compiled_beforehand_is_not_compiled_again(tiny):
    request = ask(format=JsonFormat(CITY))
    compiled = tiny._constraints._grammars._compiled
    tiny.preprocess(request)
    misses = compiled.cache_info().misses
    tiny.prepare(request, itertools.count())
    tiny.prepare(ask(format=JsonFormat(CITY), n=3), itertools.count())
    assert compiled.cache_info().misses == misses


class Encoded(BaseException):
    """A text was encoded."""


def test_the_engine_thread_encodes_nothing(tiny_llama_path, monkeypatch):
    """The tokenizer worker renders prompts at the same time, and a tokenizer has modes."""
    runner = Builder(0.25).build(ModelSpec("tiny", str(tiny_llama_path), type="thinking", context_length=2048))
    request = runner.preprocess(ask(format=JsonFormat(CITY), thinking_budget=5, n=2, min_tokens=3))

    def refuse(*args, **kwargs):
        raise Encoded

    monkeypatch.setattr(type(runner.tokenizer._tokenizer), "_encode_plus", refuse)
    with pytest.raises(Encoded):
        runner.preprocess(ask("A text that is new."))
    assert [sequence.constraint is not None for sequence, _ in runner.prepare(request, itertools.count())] == [True] * 2
    runner.batch.close()


def test_requests_are_formatted_side_by_side_while_tokens_are_read(tiny):
    words = [f"number {n} <|im_end|> " * 50 for n in range(24)]  # a control token in a message is text
    expected = [tiny.preprocess(ask(text)).formatted for text in words]
    detokenizer = make_detokenizer(tiny.tokenizer)
    with ThreadPoolExecutor(8) as pool:
        formatting = [pool.submit(tiny.preprocess, ask(text)) for text in words]
        while not all(future.done() for future in formatting):
            assert detokenizer.feed(20) is not None
    assert [future.result().formatted for future in formatting] == expected
    assert tiny.prepare(formatting[0].result(), itertools.count())[0][0].tokens == expected[0].tokens


def test_mixed_requests_run_in_one_batch(tiny_llama_path):
    """Several choices, log-probabilities, a seed, a schema, a bias, penalties: one step advances all eleven."""
    metrics = ModelMetrics("tiny")
    runner = Builder(0.25).build(ModelSpec("tiny", str(tiny_llama_path), context_length=2048), metrics=metrics)
    before = metrics.batch_size.cumulative
    long, endless = {"max_tokens": 40}, {"max_tokens": 40, "ignore_eos": True}
    requests = [
        ask("a", n=4, **endless),
        ask("b", top_logprobs=5, **endless),
        ask("c", sampling={"temperature": 1.0, "seed": 7}, **endless),
        ask("d", format=JsonFormat(), **long),
        ask("e", sampling={"logit_bias": {5: 2.0}}, **endless),
        ask("f", sampling={"temperature": 0.0}, **endless),
        ask("g", sampling={"frequency_penalty": 1.0, "repetition_penalty": 1.1, "top_k": 9}, **endless),
        ask("h", min_tokens=20, **endless),
    ]
    assert len(generate(runner, *requests)) == 11
    runner.batch.close()
    steps = [now - then for now, then in zip(metrics.batch_size.cumulative, before, strict=True)]
    up_to_8, of_all = steps[metrics.batch_size.bounds.index(8.0)], steps[-1]
    assert of_all < 2 * 40  # one after the other they would take 8 * 40
    assert of_all - up_to_8 > 30  # more than eight sequences in a step: those of nearly all requests


def test_a_named_function_is_called_once(tiny):
    (events,) = generate(tiny, ask(tools=TOOLS, tool_choice=ToolChoice("function", "clock")))
    assert [e.name for e in events if isinstance(e, ToolCallDelta) and e.name] == ["clock"]
    assert events[-1] == Finish("tool_calls")


def test_n_choices_come_from_one_prompt_and_differ_by_their_seeds(tiny):
    request = ask(n=3, max_tokens=12)
    choices = generate(tiny, request)
    assert [events[-1].index for events in choices] == [0, 1, 2]
    assert len({content(events) for events in choices}) == 3
    assert generate(tiny, ask(max_tokens=12))[0] == choices[0]


def test_more_choices_than_slots_are_refused(tiny):
    with pytest.raises(PromptRejected) as refusal:
        tiny.prepare(ask(n=33), itertools.count())
    assert refusal.value.param == "n"


@pytest.mark.parametrize("top", [0, 1, 20])
def test_log_probabilities_go_with_their_tokens_and_are_those_of_the_model(tiny, top):
    """At temperature 0 the chosen token is the likeliest, so that its value heads the list."""
    (events,) = generate(tiny, ask(top_logprobs=top, max_tokens=8, sampling={"temperature": 0}))
    entries = [entry for event in events if isinstance(event, Delta) for entry in event.logprobs]
    assert len(entries) == 8
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top) == top
        values = [other.logprob for other in entry.top]
        assert values == sorted(values, reverse=True)
        if top:
            assert entry.top[0].logprob == pytest.approx(entry.logprob)
    text = b"".join(entry.bytes for entry in entries).decode(errors="replace")
    assert text in (content(events), content(events) + "\ufffd")  # what max_tokens cut in two is no content


def test_log_probabilities_do_not_change_the_answer(tiny):
    plain, measured = ask(max_tokens=15), ask(max_tokens=15, top_logprobs=5)
    together = generate(tiny, plain, measured, plain)
    assert {content(events) for events in together} == {content(generate(tiny, plain)[0])}


def test_min_tokens_keeps_an_answer_from_ending(tiny):
    """A bias makes the end of the sequence the likeliest token everywhere."""
    (eos,) = tiny.tokenizer.eos_token_ids
    eager = {"temperature": 0, "logit_bias": {eos: 100.0}}
    at_once, later = generate(
        tiny, ask(sampling=eager, top_logprobs=0), ask(sampling=eager, top_logprobs=0, min_tokens=10)
    )
    lengths = [sum(len(e.logprobs) for e in events if isinstance(e, Delta)) for events in (at_once, later)]
    assert (lengths, at_once[-1], later[-1]) == ([0, 10], Finish("stop"), Finish("stop"))


def bits(mask):
    return np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")


def test_a_restriction_forbids_its_tokens_for_so_many_tokens():
    restricted = Restricted([3, 9], tokens=2, vocab_size=16)
    assert [int(n) for n in np.flatnonzero(bits(restricted.allowed()) == 0)] == [3, 9]
    restricted.accept(1)
    restricted.accept(1)
    assert restricted.allowed() is None


def test_constraints_together_allow_what_all_of_them_allow():
    every = Every([Restricted([1], 9, 16), Restricted([2], 9, 16)])
    assert [int(n) for n in np.flatnonzero(bits(every.allowed()) == 0)] == [1, 2]
