"""Tokens of one choice become text, channels and one finish, however the text falls on tokens."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlxserver.engine.events import Delta, Finish, TokenLogprob, ToolCallDelta
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.reasoning_formats import HARMONY, THINK
from mlxserver.engine.output.stop_strings import StopStrings, overlap
from mlxserver.engine.output.stream import OutputStream
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.output.token_bytes import token_bytes, token_logprob
from mlxserver.engine.output.tool_calls import ToolCallParser
from mlxserver.engine.output.tool_formats import FORCED, PLAIN
from tools.harness.scripts import EOS, Script, script_ids, script_tokenizer


class Play:
    """Pieces as tokens, and a stream that reads them."""

    def __init__(self, pieces, *, thinking=None, tools=None, parallel=True, max_tokens=1000, **options):
        script = Script(pieces)
        tokenizer = script_tokenizer([script])
        self.eos = tokenizer.token_to_id(EOS)
        self.tokens = [*script_ids(tokenizer, script), self.eos]
        parser = {
            None: lambda: None,
            "tags": lambda: ThinkingParser(THINK, False),
            "inside": lambda: ThinkingParser(THINK, True),
            "calls": lambda: ThinkingParser(THINK, True, call_starts=("<tool_call>",)),
            "channels": lambda: ChannelParser(HARMONY, tools=("add",)),
        }[thinking]()
        backend = SimpleNamespace(backend_tokenizer=tokenizer)
        self.stream = OutputStream(
            backend,
            eos=[self.eos],
            max_tokens=max_tokens,
            thinking=parser,
            tools=tools and ToolCallParser(tools, parallel=parallel),
            **options,
        )

    def steps(self):
        """The events of every token up to the finish."""
        for token in self.tokens:
            yield self.stream.feed(token)
            if self.stream.is_finished:
                return

    def measured(self):
        """The deltas of text, where each token has its place among the tokens as its log-probability."""
        names = [TokenLogprob("", b"", float(n)) for n in range(len(self.tokens))]
        for token, name in zip(self.tokens, names, strict=True):
            yield from (event for event in self.stream.feed(token, name) if isinstance(event, Delta))
            if self.stream.is_finished:
                return

    def result(self):
        """Reasoning, content and the reason of the finish, which must be the last event."""
        *deltas, finish = [event for events in self.steps() for event in events]
        assert all(isinstance(delta, Delta) and delta.text for delta in deltas)
        texts = ("".join(d.text for d in deltas if d.channel == c) for c in ("reasoning", "content"))
        return (*texts, finish.reason)

    def outcome(self):
        """The same, and the calls as [name, arguments] before the reason."""
        *events, finish = [event for events in self.steps() for event in events]
        deltas = [event for event in events if isinstance(event, Delta)]
        calls = []
        for event in events:
            if isinstance(event, ToolCallDelta):
                if event.id:
                    calls.append([event.name, ""])
                calls[event.call][1] += event.arguments
        texts = ("".join(d.text for d in deltas if d.channel == c) for c in ("reasoning", "content"))
        return (*texts, calls, finish.reason)


def test_tokens_are_emitted_as_they_come_and_the_end_of_sequence_finishes():
    play = Play(["Hello", " world", "!"])
    assert list(play.steps()) == [[Delta("Hello")], [Delta(" world")], [Delta("!")], [Finish("stop")]]
    assert play.stream.completion_tokens == 4


def test_nothing_is_accepted_after_the_finish():
    play = Play(["a"])
    play.result()
    with pytest.raises(ValueError, match="after the end"):
        play.stream.feed(play.tokens[0])


def test_the_index_of_the_choice_is_on_every_event():
    assert list(Play(["<think>a</think>", "b"], thinking="tags", index=3).steps()) == [
        [Delta("a", "reasoning", 3)],
        [Delta("b", "content", 3)],
        [Finish("stop", 3)],
    ]


def test_a_limit_flushes_what_is_held_back():
    assert list(Play(["a", " ST", "OP"], stop=["STOP"], max_tokens=2).steps()) == [
        [Delta("a")],
        [Delta(" "), Delta("ST"), Finish("length")],
    ]
    assert Play(["<think>", "a", " \n</", "think>"], thinking="tags", max_tokens=3).result() == ("a \n</", "", "length")


def test_an_incomplete_character_waits_and_ends_as_a_replacement_character():
    assert list(Play([b"a\xf0\x9f", b"\x98", b"\x80b"]).steps()) == [[], [], [Delta("a😀b")], [Finish("stop")]]
    assert Play(["a", b"\xf0\x9f"]).result() == ("", "a�", "stop")


def test_a_character_that_max_tokens_cuts_in_two_is_left_out():
    assert Play(["a", b"\xf0\x9f", "b"], max_tokens=2).result() == ("", "a", "length")
    assert Play([b"a\xf0\x9f", "b"], max_tokens=1).result() == ("", "a", "length")


@pytest.mark.parametrize(
    ("pieces", "stop", "content", "reason"),
    [
        (["one ST", "OP two"], ["STOP"], "one ", "stop"),
        (["ST", "AR", "ST", "OP"], ["STOP"], "STAR", "stop"),
        (["aab"], ["ab"], "a", "stop"),
        (["STOP"], ["STOP"], "", "stop"),
        (["one", " two"], ["STOP", ""], "one two", "stop"),
        (["a", b"\xe2\x82", b"\xac!"], ["€"], "a", "stop"),
        (["x abc"], ["abcd", "bc"], "x a", "stop"),
        (["one ST"], ["STOP"], "one ST", "stop"),
    ],
)
def test_a_stop_string_ends_the_content_and_is_never_part_of_it(pieces, stop, content, reason):
    assert Play(pieces, stop=stop).result() == ("", content, reason)


def test_the_finish_names_the_stop_string_that_was_found():
    assert [*Play(["a b", "c d"], stop=["d", "bc"]).steps()][-1][-1] == Finish("stop", stop="bc")
    assert [*Play(["a", "b"], stop=["bc"]).steps()][-1][-1] == Finish("stop")


def test_text_is_released_as_soon_as_it_can_be_no_stop_string():
    stops = StopStrings(["STOP", "\n\n"])
    fed = [stops.feed(piece) for piece in ("one S", "T", "A", "\n", "x\n")]
    assert [text.text for text, _ in fed] == ["one ", "", "STA", "", "\nx"]
    assert not any(is_stopped for _, is_stopped in fed)
    assert stops.flush() == TokenText("\n")


def test_a_stop_string_in_the_text_released_at_the_end_still_counts():
    assert Play(["a </thi"], thinking="tags", stop=["<"]).result() == ("", "a ", "stop")
    assert Play(["<thi"], thinking="tags", stop=["<"], max_tokens=1).result() == ("", "", "stop")


def test_reasoning_is_not_searched_for_stop_strings():
    pieces = ["<think>", "a\n\nb", "</think>", "\n\n", "c", "\n\n", "d"]
    assert Play(pieces, thinking="tags", stop=["\n\n"]).result() == ("a\n\nb", "c", "stop")


@pytest.mark.parametrize(
    ("pieces", "thinking", "reasoning_tokens"),
    [
        (["<think>", "a", "b", "</think>", "\n\n", "c"], "tags", 4),
        (["<", "think", ">a", "</", "think>", "c"], "tags", 5),
        (["a", "</think>", "c"], "inside", 2),
        (["<think>", "a"], "tags", 3),
        (["a", "<think>"], "tags", 0),
        (["<think>", "a"], None, 0),
    ],
)
def test_reasoning_tokens_are_counted_up_to_the_end_of_the_reasoning(pieces, thinking, reasoning_tokens):
    play = Play(pieces, thinking=thinking)
    play.result()
    assert (play.stream.reasoning_tokens, play.stream.completion_tokens) == (reasoning_tokens, len(pieces) + 1)


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = ["add", '{"a": 1}']


@pytest.mark.parametrize(
    ("pieces", "options", "outcome"),
    [
        (["So. ", CALL], {}, ("", "So.", [ADD], "tool_calls")),
        (["<think>a</think>", CALL, CALL], {"thinking": "tags"}, ("a", "", [ADD, ADD], "tool_calls")),
        (["<think>", CALL], {"thinking": "tags"}, (CALL, "", [], "stop")),
        ([CALL.replace(":", "")], {}, ("", CALL.replace(":", ""), [], "stop")),
        ([CALL, " b"], {"max_tokens": 2}, ("", "b", [ADD], "length")),
        ([CALL[:-30], CALL[-30:]], {"max_tokens": 1}, ("", CALL[:-30], [], "length")),
        ([CALL, " b STOP"], {"stop": ["STOP"]}, ("", "b ", [ADD], "tool_calls")),
        ([CALL], {"stop": ["add"]}, ("", '<tool_call>{"name": "', [], "stop")),
    ],
)
def test_tool_calls_are_no_part_of_the_content(pieces, options, outcome):
    """The answer ends with "tool_calls" if at least one is whole and the answer was not cut."""
    assert Play(pieces, tools=PLAIN, **options).outcome() == outcome


@pytest.mark.parametrize(
    ("pieces", "options", "outcome", "reasoning_tokens"),
    [
        (["a", "\n<tool", CALL[5:]], {}, ("a", "", [ADD], "tool_calls"), 1),
        (["a", "\n", CALL, CALL, " b"], {}, ("a", "b", [ADD, ADD], "tool_calls"), 2),
        (["a", "\n", CALL, " b STOP"], {"stop": ["STOP"]}, ("a", "b ", [ADD], "tool_calls"), 2),
        (["a", CALL, "</think>", "b"], {}, (f"a{CALL}", "b", [], "stop"), 3),
        (["a", " <tool_call> tags"], {}, ("a <tool_call> tags", "", [], "stop"), 3),
        (["a", " <tool"], {}, ("a <tool", "", [], "stop"), 3),
        (["a ", CALL[:-14], CALL[-14:]], {"max_tokens": 2}, ("a", "", [["add", '{"a": 1']], "length"), 1),
        (["a ", CALL[:25], CALL[25:]], {"max_tokens": 2}, (f"a {CALL[:25]}", "", [], "length"), 2),
    ],
)
def test_a_call_ends_reasoning_that_is_never_closed(pieces, options, outcome, reasoning_tokens):
    play = Play(pieces, thinking="calls", tools=PLAIN, **options)
    assert (play.outcome(), play.stream.reasoning_tokens) == (outcome, reasoning_tokens)


ANALYSIS = ["<|channel|>", "analysis", "<|message|>", "Well.", "<|end|>"]
FINAL = ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "Yes", " it is"]
TO_ADD = [
    "<|start|>",
    "assistant",
    "<|channel|>",
    "commentary to=functions.add <|constrain|>json",
    "<|message|>",
    '{"a": 1}',
]


@pytest.mark.parametrize(
    ("pieces", "options", "outcome", "reasoning_tokens"),
    [
        ([*ANALYSIS, *FINAL], {}, ("Well.", "Yes it is", [], "stop"), 5),
        ([*ANALYSIS, *FINAL], {"stop": ["ell", "s i"]}, ("Well.", "Ye", [], "stop"), 5),
        ([*ANALYSIS, *FINAL], {"max_tokens": 9}, ("Well.", "", [], "length"), 5),
        ([*ANALYSIS, *TO_ADD], {}, ("Well.", "", [ADD], "tool_calls"), 5),
        ([*FINAL, "<|end|>", *TO_ADD], {"stop": ["isn"]}, ("", "Yes it is", [ADD], "tool_calls"), 0),
        ([*FINAL, "<|end|>", *FINAL[:2], *ANALYSIS], {}, ("Well.", "Yes it is", [], "stop"), 8),
        ([*TO_ADD], {"max_tokens": 6}, ("", "", [ADD], "length"), 0),
        ([*TO_ADD, "<|call|>", *TO_ADD], {"tools": PLAIN}, ("", "", [ADD, ADD], "tool_calls"), 0),
    ],
)
def test_channels_become_reasoning_content_and_calls(pieces, options, outcome, reasoning_tokens):
    play = Play(pieces, thinking="channels", **options)
    assert (play.outcome(), play.stream.reasoning_tokens) == (outcome, reasoning_tokens)


def test_in_channels_tokens_of_marks_and_headers_are_dropped():
    deltas = Play([*ANALYSIS, *FINAL], thinking="channels").measured()
    assert [(delta.text, [int(token.logprob) for token in delta.logprobs]) for delta in deltas] == [
        ("Well.", [3]), ("Yes", [10]), (" it is", [11]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "thinking", "options", "outcome"),
    [
        (["a", " b"], "inside", {}, ("a b", "a b", "stop")),
        (["a", " b"], "inside", {"stop": ["b"]}, ("a b", "a b", "stop")),
        (["a", " b"], "inside", {"max_tokens": 2}, ("a b", "", "length")),
        (["a", "</think>", "b"], "inside", {}, ("a", "b", "stop")),
        (["a", "</think>"], "inside", {}, ("a", "", "stop")),
        (["a", "</think>", "STOP"], "inside", {"stop": ["STOP"]}, ("a", "", "stop")),
        ([" <think>", "a"], "tags", {}, ("a", "a", "stop")),
        (ANALYSIS, "channels", {}, ("Well.", "Well.", "stop")),
        ([*ANALYSIS, *FINAL[:5]], "channels", {}, ("Well.", "Well.", "stop")),
        ([*ANALYSIS, *FINAL], "channels", {}, ("Well.", "Yes it is", "stop")),
        (["b"], "tags", {}, ("", "b", "stop")),
        ([], "inside", {}, ("", "", "stop")),
    ],
)
def test_an_answer_that_is_all_reasoning_can_be_content_too(pieces, thinking, options, outcome):
    assert Play(pieces, thinking=thinking, repeats_unclosed=True, **options).result() == outcome


def test_a_forced_answer_has_no_tags():
    play = Play(["\n[", '{"name": "add", "arguments": {"a": 1}}', "]"], tools=FORCED)
    assert play.outcome() == ("", "", [ADD], "tool_calls")


def test_the_first_call_ends_the_choice_where_it_is_the_only_one():
    play = Play([CALL[:-14], CALL[-14:], CALL, "b"], tools=PLAIN, parallel=False)
    assert play.outcome() == ("", "", [ADD], "tool_calls")
    assert play.stream.completion_tokens == 2


def test_an_end_of_sequence_that_is_ignored_has_no_text():
    play = Play(["a", "b"], ignore_eos=True, max_tokens=4)
    feeds = [*play.tokens[:1], play.eos, play.eos, play.tokens[1]]
    named = [TokenLogprob(str(n), b"", 0.0) for n in range(4)]
    emitted = [play.stream.feed(token, name) for token, name in zip(feeds, named, strict=True)]
    assert emitted == [
        [Delta("a", logprobs=(named[0],))],
        [],
        [],
        [Delta("b", logprobs=(named[3],)), Finish("length")],
    ]


@pytest.mark.parametrize(
    ("pieces", "options", "emitted"),
    [
        (["a", "b"], {}, [("a", [0]), ("b", [1])]),
        (["a", b"\xf0\x9f", b"\x98\x80", "b"], {}, [("a", [0]), ("😀", [1, 2]), ("b", [3])]),
        (["a ST", "A"], {"stop": ["STOP"]}, [("a ", [0]), ("STA", [1])]),
        (["a S", "TO", "P"], {"stop": ["STOP"]}, [("a ", [0])]),
        (["a", "STOP"], {"stop": ["STOP"]}, [("a", [0])]),
        (["<think>", "\n", "a", "</", "think>", "b"], {"thinking": "tags"}, [("a", [2]), ("b", [5])]),
        (["<think>a</", "think>b"], {"thinking": "tags"}, [("a", [0]), ("b", [1])]),
        (["a", " ", CALL[:9], CALL[9:], "b"], {"tools": PLAIN}, [("a", [0]), ("b", [4])]),
        (["a ", "<tool", "s>"], {"tools": PLAIN}, [("a", [0]), (" <tools>", [1, 2])]),
        (["a", b"\xf0"], {}, [("a", [0]), ("\ufffd", [1])]),
        (["a", b"\xf0", b"\x9f", "b"], {"max_tokens": 3}, [("a", [0]), ("", [1, 2])]),
        ([b"a\xf0", "b"], {"max_tokens": 1}, [("a", [0])]),
    ],
)
def test_a_tokens_log_probabilities_go_with_the_first_of_its_text_that_is_emitted(pieces, options, emitted):
    deltas = Play(pieces, **options).measured()
    assert [(delta.text, [int(token.logprob) for token in delta.logprobs]) for delta in deltas] == emitted


FRAGMENTS = ["<think>", "</think>", "<thi", "nk>", "\n", " ", "a", "b", "STOP", "ST", "OP", "aSTb", "€", "👩‍👩‍👧"]
CALLS = [CALL, CALL[:24], CALL[24:], '{"name": "f"}', "<tool_call>", "".join(ANALYSIS), "".join(TO_ADD), FINAL[0]]
STOPS = ["STOP", "OP", "TO", "\n\n", "ab", "€a", "aSTbSTOP", "<think>", "👩", '"a"', "}}", "</tool"]
CUTS = st.lists(st.integers(1, 160))


def options(*thinking):
    return st.fixed_dictionaries(
        {
            "stop": st.lists(st.sampled_from(STOPS), max_size=3),
            "thinking": st.sampled_from([None, *thinking]),
            "tools": st.sampled_from([None, PLAIN, FORCED]),
        }
    )


OPTIONS = options("tags", "inside", "calls")  # between channels there are blank lines that are no tokens


def cut(text, cuts):
    """The text in pieces of bytes; they may end inside a character."""
    raw = text.encode()
    borders = [0, *sorted({cut for cut in cuts if cut < len(raw)}), len(raw)]
    return [raw[a:b] for a, b in pairwise(borders)]


@given(
    st.lists(st.sampled_from(FRAGMENTS + CALLS), max_size=12).map("".join),
    CUTS,
    options("tags", "inside", "calls", "channels"),
)
def test_any_fall_of_a_text_on_tokens_gives_the_same_result(text, cuts, options):
    outcome = Play(cut(text, cuts), **options).outcome()
    assert outcome == Play([text], **options).outcome()
    assert not any(stop_string in outcome[1] for stop_string in options["stop"])


@given(st.lists(st.sampled_from(FRAGMENTS + CALLS), max_size=12).map("".join), CUTS, OPTIONS)
def test_every_token_is_accounted_for_once_with_text_of_its_own(text, cuts, options):
    """In order, and with every emitted character at least one of its tokens, now or before."""
    pieces = cut(text, cuts)
    deltas = list(Play(pieces, **options).measured())
    numbers = [int(token.logprob) for delta in deltas for token in delta.logprobs]
    assert numbers == sorted(set(numbers))
    unused = b""
    for delta in deltas:
        unused += b"".join(pieces[int(token.logprob)] for token in delta.logprobs)
        emitted = delta.text.encode()
        assert emitted in unused
        unused = unused[unused.index(emitted) + len(emitted) :]


@given(st.lists(st.sampled_from([f for f in FRAGMENTS + CALLS if f.isascii()]), max_size=12).map("".join), OPTIONS)
def test_where_every_character_is_a_token_each_delta_has_exactly_its_own(text, options):
    for delta in Play(list(text) or [""], **options).measured():
        assert "".join(text[int(token.logprob)] for token in delta.logprobs) == delta.text


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=5))
def test_the_overlap_is_the_longest_end_that_begins_what_is_wanted(text, wanted):
    lengths = range(min(len(text), len(wanted) - 1) + 1)
    assert overlap(text, wanted) == max(n for n in lengths if text.endswith(wanted[:n]))


@given(st.lists(st.integers(0, 401), max_size=30))
def test_streamed_text_is_the_text_of_all_tokens_decoded_at_once(tiny_tokenizer, ids):
    """Ids outside the vocabulary, special tokens and bytes that are no characters included."""
    detokenizer = make_detokenizer(tiny_tokenizer)
    streamed = "".join([detokenizer.feed(token) for token in ids] + [detokenizer.flush()])
    assert streamed == tiny_tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_tokenizer_without_a_rust_core_is_read_with_mlx_lms_detokenizer(tiny_tokenizer):
    detokenizer = make_detokenizer(SimpleNamespace(detokenizer=tiny_tokenizer.detokenizer))
    ids = tiny_tokenizer.encode("Hello, how are you 😀?", add_special_tokens=False)
    pieces = [detokenizer.feed(token) for token in ids]
    assert len(pieces) > 3
    assert "".join([*pieces, detokenizer.flush()]) == "Hello, how are you 😀?"


@given(st.text(max_size=20))
def test_the_bytes_of_single_tokens_joined_are_the_text(tiny_tokenizer, text):
    """Bytes that are no whole character, too: their own text has U+FFFD."""
    named = [token_logprob(tiny_tokenizer, t, -1.0) for t in tiny_tokenizer.encode(text, add_special_tokens=False)]
    assert b"".join(token.bytes for token in named) == text.encode()
    assert all(token.text == token.bytes.decode(errors="replace") for token in named)


def test_a_tokens_log_probability_comes_with_the_likeliest_ones(tiny_tokenizer):
    a, b = tiny_tokenizer.encode("a", add_special_tokens=False)[0], tiny_tokenizer.eos_token_id
    assert token_logprob(tiny_tokenizer, a, -0.5, [(b, -0.25), (a, -0.5)]) == TokenLogprob(
        "a", b"a", -0.5, (TokenLogprob("<|im_end|>", b"<|im_end|>", -0.25), TokenLogprob("a", b"a", -0.5))
    )
    assert token_bytes(tiny_tokenizer, 10**6) == b""


def test_sentencepiece_tokens_have_their_space_and_their_byte(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "▁Hi", "Hi", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    spelled = [token_bytes(fast, tokens.index(token)) for token in ("▁Hi", "Hi", "▁", "<0xF0>", "<0x41>", "</s>")]
    assert spelled == [b" Hi", b"Hi", b" ", b"\xf0", b"A", b"</s>"]
