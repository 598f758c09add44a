"""Conversations and their files: any text survives both formats."""

from hypothesis import given
from hypothesis import strategies as st

from mlxserver.client.conversation import Conversation
from mlxserver.client.transcript import ROLES, format_json, format_markdown, parse_json, parse_markdown

LINES = st.sampled_from(["## user", "\\## user", "\\\\## tool", "", "x", "##user", "\r", "## user\r", " "])
TEXTS = st.lists(LINES | st.text(st.characters(exclude_categories=["Cs"]))).map("\n".join)


@given(st.lists(st.tuples(st.sampled_from(ROLES), TEXTS)))
def test_a_conversation_survives_both_formats(messages):
    conversation = Conversation(tuple({"role": role, "content": text} for role, text in messages))
    assert parse_json(format_json(conversation)) == conversation
    if messages:
        assert parse_markdown(format_markdown(conversation)) == conversation


@given(st.text())
def test_any_text_as_a_transcript_is_parsed_or_refused(text):
    for parse in (parse_json, parse_markdown):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)


def test_a_conversation_is_undone_turn_by_turn():
    before = Conversation().with_system("Be brief.").with_turn("Hi", "Ho")
    after = before.with_turn("And?", "Well.")
    assert (after.turns, after.last_question, after.without_last_turn()) == (2, "And?", before)
    assert after.cleared() == Conversation().with_system("Be brief.")
    assert after.with_system("").messages == after.messages[1:]
    assert Conversation().without_last_turn() == Conversation()
    parts = Conversation(({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},))
    assert parts.last_question == "ab"
