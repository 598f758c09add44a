"""Requests that tests send and leave."""

import json

from tools.harness.running_server import chat_body


def send_plain(server, key, text):
    """A plain request that is sent, and whose answer is not read yet."""
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(chat_body(key, text)))
    return connection
