"""One choice's tokens become text, channels and one finish, however the text falls on tokens."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import make_detokenizer
from engine.matching import StopStrings, overlap
from engine.output import OutputStream
from engine.thinking import ThinkingParser
from engine.types import Delta, Finish
from tests.scripts import EOS, Script, script_ids, script_tokenizer


class Play:
    """Pieces as tokens, and a stream that reads them."""

    def __init__(self, pieces, *, thinking=None, max_tokens=1000, **options):
        script = Script(pieces)
        tokenizer = script_tokenizer([script])
        self.eos = tokenizer.token_to_id(EOS)
        self.tokens = [*script_ids(tokenizer, script), self.eos]
        parser = None if thinking is None else ThinkingParser("<think>", "</think>", thinking == "inside")
        backend = SimpleNamespace(backend_tokenizer=tokenizer)
        self.stream = OutputStream(backend, eos=[self.eos], max_tokens=max_tokens, thinking=parser, **options)

    def steps(self):
        """The events of every token up to the finish."""
        for token in self.tokens:
            yield self.stream.feed(token)
            if self.stream.is_finished:
                return

    def result(self):
        """Reasoning, content and the reason of the finish, which must be the last event."""
        *deltas, finish = [event for events in self.steps() for event in events]
        assert all(isinstance(delta, Delta) and delta.text for delta in deltas)
        texts = ("".join(d.text for d in deltas if d.channel == c) for c in ("reasoning", "content"))
        return (*texts, finish.reason)


def test_tokens_are_told_as_they_come_and_the_end_of_sequence_finishes():
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
    assert Play(["a", b"\xf0\x9f", "b"], max_tokens=2).result() == ("", "a�", "length")


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


def test_text_is_released_as_soon_as_it_can_be_no_stop_string():
    stops = StopStrings(["STOP", "\n\n"])
    fed = [stops.feed(piece) for piece in ("one S", "T", "A", "\n", "x\n")]
    assert fed == [("one ", False), ("", False), ("STA", False), ("", False), ("\nx", False)]
    assert stops.flush() == "\n"


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


FRAGMENTS = ["<think>", "</think>", "<thi", "nk>", "\n", " ", "a", "b", "STOP", "ST", "OP", "aSTb", "€", "👩‍👩‍👧"]
STOPS = ["STOP", "OP", "TO", "\n\n", "ab", "€a", "aSTbSTOP", "<think>", "👩"]


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.integers(1, 120)),
    st.lists(st.sampled_from(STOPS), max_size=3),
    st.sampled_from([None, "tags", "inside"]),
)
def test_any_fall_of_a_text_on_tokens_gives_the_same_result(text, cuts, stop, thinking):
    """Tokens may end inside a character."""
    raw = text.encode()
    borders = [0, *sorted({cut for cut in cuts if cut < len(raw)}), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(borders)]
    result = Play(pieces, stop=stop, thinking=thinking).result()
    assert result == Play([raw], stop=stop, thinking=thinking).result()
    assert not any(stop_string in result[1] for stop_string in stop)


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
