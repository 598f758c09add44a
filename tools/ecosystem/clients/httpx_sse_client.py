# mypy: ignore-errors
"""httpx-sse, a strict reader of event streams."""

import json
import os
from importlib.metadata import version

import httpx
from httpx_sse import connect_sse

body = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": "Repeat after me: 👨‍👩‍👧 é 🇫🇷 日本語"}],
    "stream": True,
    "temperature": 0,
    "max_tokens": 40,
    "stop": "\n",
}
print("httpx-sse", version("httpx-sse"))
with (
    httpx.Client(timeout=60) as client,
    connect_sse(client, "POST", f"{os.environ['OPENAI_BASE_URL']}/chat/completions", json=body) as source,
):
    *events, last = source.iter_sse()
assert last.data == "[DONE]"
pieces = [json.loads(event.data)["choices"][0]["delta"].get("content", "") for event in events]
assert "".join(pieces)
assert not any("\ufffd" in piece for piece in pieces)
print("stream")
