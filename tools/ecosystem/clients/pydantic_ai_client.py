# mypy: ignore-errors
"""pydantic-ai's OpenAI chat model."""

import asyncio
import os
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Capital(BaseModel):
    """The capital that was asked for."""

    city: Literal["Paris", "London"]


QUESTION = "What is the capital of France?"
SETTINGS = {"temperature": 0, "max_tokens": 60}
model = OpenAIChatModel(
    os.environ["MODEL"], provider=OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key="none")
)
print("pydantic-ai", version("pydantic-ai-slim"))

assert "Paris" in Agent(model, model_settings=SETTINGS).run_sync(QUESTION).output
print("chat")


async def streamed() -> str:
    """The answer, put together from what was streamed."""
    async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


assert "Paris" in asyncio.run(streamed())
print("stream")

assert Agent(model, output_type=Capital, model_settings=SETTINGS).run_sync(QUESTION).output.city
print("tools")

assert Agent(model, output_type=NativeOutput(Capital), model_settings=SETTINGS).run_sync(QUESTION).output.city
print("structured")
