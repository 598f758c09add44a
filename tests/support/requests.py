"""Requests that tests send and leave."""

import json

from tools.harness.running_server import chat_body


def send_plain(server, key, text):
    """A plain request that is sent, and whose answer is not read yet."""
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(chat_body(key, text)))
    return connection


# Fields that programs send unasked, in every dialect.
UNASKED = {
    "store": True,
    "metadata": {"a": "b"},
    "user": "u",
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "verbosity": "low",
    "client_metadata": {"session": "x"},
    "include": ["reasoning.encrypted_content"],
    "cache_control": {"type": "ephemeral"},
    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
}
