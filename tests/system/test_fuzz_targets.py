"""The parsers that meet other people's bytes, with some bytes of each kind; tools/fuzz_parsers.py looks for more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import fuzz_parsers
from tools.fuzz_targets import TARGETS

EXAMPLES = [(name, example) for name, (_, examples) in TARGETS.items() for example in examples]


def test_every_target_can_be_asked_for():
    assert list(TARGETS) == list(fuzz_parsers.NAMES)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_a_parser_takes_its_examples_and_whatever_is_left_of_them(name, example):
    for length in range(len(example) + 1):
        TARGETS[name][0](example[:length])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_parser_takes_any_bytes_within_its_examples(name, data):
    example = data.draw(st.sampled_from(TARGETS[name][1]))
    place = data.draw(st.integers(0, len(example)))
    TARGETS[name][0](example[:place] + data.draw(st.binary(max_size=20)) + example[place:])
