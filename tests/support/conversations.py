"""Prompts for the engine, from the messages and tools that a client of OpenAI's API writes."""

from mlxserver.api.openai.messages import check_messages
from mlxserver.api.openai.tools import check_tools
from mlxserver.engine.requests import ChatPrompt


def chat_prompt(messages, tools=(), **fields):
    """A prompt of OpenAI's messages and tools."""
    return ChatPrompt(check_messages(list(messages), "messages"), check_tools(list(tools), "tools"), **fields)


def question(text, tools=()):
    """A prompt of one question."""
    return chat_prompt([{"role": "user", "content": text}], tools)
