"""A conversation that is longer than the context loses its oldest messages, and no others."""

from mlxserver.engine.conversation import Message, Text, ToolCall, ToolResult
from mlxserver.engine.prompt.truncation import most_tokens, truncate
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt


def message(role, text="word"):
    return Message(role, (Text(text),))


def fitted(messages, most):
    """The roles of what is left, where each message has a token."""

    def format(prompt):
        return FormattedPrompt(tuple(range(len(prompt.conversation))), ".".join(m.role for m in prompt.conversation))

    return truncate(ChatPrompt(tuple(messages)), format, most).text.split(".")


def test_what_fits_stays_as_it_is():
    assert fitted([message("user"), message("assistant"), message("user")], 3) == ["user", "assistant", "user"]


def test_the_oldest_messages_behind_the_system_message_leave():
    messages = [
        message("system"),
        *[message(role) for _ in range(4) for role in ("user", "assistant")],
        message("user"),
    ]
    assert fitted(messages, 4) == ["system", "user", "assistant", "user"]


def test_a_result_leaves_with_its_call():
    call = Message("assistant", (ToolCall("1", "f", {}),))
    result = Message("tool", (ToolResult("1", "x"),))
    assert fitted([message("user"), call, result, message("assistant"), message("user")], 3) == ["assistant", "user"]


def test_the_last_message_stays_even_if_it_is_too_long_alone():
    assert fitted([message("system"), message("user"), message("user")], 1) == ["system", "user"]
    assert fitted([message("user")], 0) == ["user"]


def test_the_answer_gets_its_room():
    assert most_tokens(1000, 100) == 900
    assert most_tokens(1000, None) == most_tokens(1000, 5000) == 750
    assert most_tokens(2, 1) == 1
