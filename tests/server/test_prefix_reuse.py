"""Turns of a conversation over HTTP, on a model of each kind of cache: how much of each comes from the prefix cache."""

import pytest

from tests.support.architectures import write_random_model
from tests.support.field_models import RECURRENT, SLIDING
from tools.harness.models import CHATML, tiny_llama
from tools.harness.running_server import running_server

HEADER = "x-anthropic-billing-header: cc_version=2.1.332.{:03x}; cc_entrypoint=cli;"
SYSTEM = "You are an agent. Read before you write, and write what was asked for. " * 4
OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kinds")
    paths = {
        "plain": tiny_llama(directory / "plain", context=4096, template=CHATML),
        "window": write_random_model(directory / "window", SLIDING),
        "hybrid": write_random_model(directory / "hybrid", RECURRENT),
    }
    models = [flag for key, path in paths.items() for flag in ("--model", f"{key}={path}")]
    with running_server("--no-defaults", "--log-level", "warning", *models) as server:
        yield server


class Conversation:
    """A conversation with one model, each of whose requests has another header in its system message."""

    def __init__(self, server, model, name):
        self.server, self.model, self.turn = server, model, 0
        self.messages = [self._message("user", f"The conversation of {name}. Say something. " * 4)]

    def _message(self, role, text):
        return {"role": role, "content": text}

    def say(self, *messages):
        self.messages += [self._message(*message) for message in messages]

    @property
    def prompt(self):
        self.turn += 1
        system = [{"type": "text", "text": text} for text in (HEADER.format(self.turn), SYSTEM)]
        return [self._message("system", system), *self.messages]

    def ask(self):
        """The answer; and of its prompt, the tokens and those from the cache."""
        body = {"model": self.model, "messages": self.prompt, "max_tokens": 8, "temperature": 0}
        answer = self.server.post("/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        usage = answer.json["usage"]
        return answer.message["content"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    def count(self, text):
        """Tokens of a text."""
        return self.server.post("/tokenize", {"model": self.model, "prompt": text}).json["count"]


@pytest.fixture(params=["plain", "window", "hybrid"])
def conversation(request, server):
    return Conversation(server, request.param, request.node.name)


def common(conversation, length):
    """How much of a prompt of this length the next one has in common with it, where it does not repeat the answer."""
    return length - conversation.count(OPENING)


def test_a_prompt_that_is_asked_again_comes_from_the_cache(conversation):
    answer, length, _ = conversation.ask()
    assert conversation.ask() == (answer, length, length - 1)


def test_an_answer_with_other_white_space_costs_no_more_than_itself(conversation):
    for _ in range(4):
        answer, length, _ = conversation.ask()
        conversation.say(("assistant", f"  {answer.strip()} \n"), ("user", "Go on."))
        _, _, cached = conversation.ask()
        assert cached >= common(conversation, length)


def test_a_last_message_that_is_edited_costs_no_more_than_itself(conversation):
    answer, _, _ = conversation.ask()
    conversation.say(("assistant", answer), ("user", "Go on with that."))
    _, length, _ = conversation.ask()
    edited = conversation.messages.pop()["content"]
    conversation.say(("user", "Leave that."))
    _, _, cached = conversation.ask()
    assert cached >= common(conversation, length) - conversation.count(edited) - conversation.count("<|im_end|>\n")


def test_another_question_under_the_same_system_message_costs_no_more_than_itself(server, conversation):
    conversation.ask()
    other = Conversation(server, conversation.model, "something else")
    _, _, cached = other.ask()
    assert cached >= other.count(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
