# mypy: ignore-errors
"""litellm, with the provider prefix of OpenAI-compatible servers."""

import os
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it looks for prices on the network

import litellm

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "London"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}
options = {
    "model": f"openai/{os.environ['MODEL']}",
    "api_base": os.environ["OPENAI_BASE_URL"],
    "messages": QUESTION,
    "temperature": 0,
    "max_tokens": 40,
}
print("litellm", version("litellm"))

assert "Paris" in litellm.completion(**options).choices[0].message.content
print("chat")

assert "Paris" in "".join(c.choices[0].delta.content or "" for c in litellm.completion(**options, stream=True))
print("stream")

answer = litellm.completion(**options, tools=[TOOL], tool_choice="required")
assert answer.choices[0].message.tool_calls[0].function.name == "weather"
print("tools")

asked = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA, "strict": True}}
assert '"city"' in litellm.completion(**options, response_format=asked).choices[0].message.content
print("structured")

text = litellm.text_completion(
    model=f"text-completion-openai/{os.environ['MODEL']}",
    api_base=os.environ["OPENAI_BASE_URL"],
    prompt="The capital of France is",
    max_tokens=8,
)
assert text.choices[0].text
print("completions")
