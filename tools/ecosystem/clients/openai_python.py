# mypy: ignore-errors
"""The official SDK for Python, with only its base URL changed."""

import json
import os
from importlib.metadata import version
from typing import Literal

from openai import BadRequestError, OpenAI
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Capital(BaseModel):
    """What is asked for."""

    city: Literal["Paris", "London"]


client = OpenAI()
chat = client.chat.completions
options = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 40}
print("openai", version("openai"))

assert MODEL in [model.id for model in client.models.list()]
assert client.models.retrieve(MODEL).id == MODEL
print("list retrieve")

assert "Paris" in chat.create(**options).choices[0].message.content
print("chat")

chunks = list(chat.create(**options, stream=True, stream_options={"include_usage": True}))
assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert chunks[-1].usage.completion_tokens > 0
print("stream")

with chat.stream(**options) as stream:
    assert "Paris" in stream.get_final_completion().choices[0].message.content
print("stream-helper")

logprobs = chat.create(**options, logprobs=True, top_logprobs=3).choices[0].logprobs.content
assert len(logprobs[0].top_logprobs) == 3
print("logprobs")

assert len(chat.create(**options, n=2).choices) == 2
print("n")

called = chat.create(**options, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
(call, *_) = called.choices[0].message.tool_calls
assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
assert called.choices[0].finish_reason == "tool_calls"
print("tools")

with chat.stream(**options, tools=[WEATHER], tool_choice="required") as stream:
    assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == "weather"
print("streamed-tools")

assert chat.parse(**options, response_format=Capital).choices[0].message.parsed.city in ("Paris", "London")
print("structured")

assert (
    client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, logprobs=2).choices[0].text
)
print("completions")

try:
    chat.create(**options, extra_body={"no_such_parameter": 1})
except BadRequestError as error:
    assert error.param == "no_such_parameter"
print("refusal")
