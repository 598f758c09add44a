# mypy: ignore-errors
"""langchain-openai's chat model."""

import os
from importlib.metadata import version
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Capital(BaseModel):
    """The capital that was asked for."""

    city: Literal["Paris", "London"]


QUESTION = "What is the capital of France?"
chat = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=60)
print("langchain-openai", version("langchain-openai"))

assert "Paris" in chat.invoke(QUESTION).content
print("chat")

assert "Paris" in "".join(chunk.content for chunk in chat.stream(QUESTION))
print("stream")

called = chat.bind_tools([Capital], tool_choice="Capital").invoke(QUESTION)
assert called.tool_calls[0]["name"] == "Capital"
print("tools")

for method in ("json_schema", "function_calling"):
    assert chat.with_structured_output(Capital, method=method).invoke(QUESTION).city in ("Paris", "London")
print("structured")
