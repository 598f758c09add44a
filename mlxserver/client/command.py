"""What the two command lines share: standard streams, the prompt, the default model, the exit status."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from math import inf

from mlxserver.client.api import ChatClient
from mlxserver.client.defaults import DEFAULT_BASE_URL
from mlxserver.client.errors import ClientError, ServerSilent, ServerUnreachable, SettingInvalid
from mlxserver.client.views import print_error, print_status

READ_TIMEOUT = 600.0  # seconds


def add_connection_options(parser: ArgumentParser) -> None:
    """Add the flags that say which server is asked, and for how long."""
    parser.add_argument("--base-url", metavar="URL", help=f"default: OPENAI_BASE_URL, else {DEFAULT_BASE_URL}")
    parser.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=READ_TIMEOUT,
        help=f"give up when no byte comes for so long (default {READ_TIMEOUT:g}; 0: never)",
    )


def client_of(arguments: Namespace) -> ChatClient:
    """The client that the flags describe."""
    return ChatClient(arguments.base_url, arguments.api_key, read_timeout=arguments.timeout or None)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = inf
    if not 0 <= seconds < inf:
        raise ArgumentTypeError(f"{text!r} is not valid; expected a number of seconds")
    return seconds


def accept_any_text() -> None:
    """Let characters that stdin or stdout can't encode become question marks instead of an exception."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def read_prompt(argument: str | None) -> str | None:
    """The argument, then a blank line and what is piped in; None when stdin is a terminal and there is no argument.

    Reads a pipe to its end. Raises SettingInvalid for an empty prompt.
    """
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if is_typed and argument is None:
        return None
    piped = "" if is_typed or sys.stdin is None else sys.stdin.read().strip("\n")
    prompt = "\n\n".join(text for text in (argument, piped) if text)
    if not prompt.strip():
        raise SettingInvalid("PROMPT", prompt, "text as the argument or on stdin")
    return prompt


async def choose_model(client: ChatClient) -> str:
    """The first model that is loaded, else one that is being loaded, or the only one. Logged on stderr.

    A model without a state counts as loaded.

    Raises SettingInvalid, and what ChatClient.models() raises.
    """
    cards = [card for card in await client.models() if not card.is_embedding]
    keys = [card.key for card in cards]
    loaded = [card.key for card in cards if card.state in ("loaded", None)]
    loaded = loaded or [card.key for card in cards if card.state == "loading"]
    if not loaded and len(keys) != 1:
        raise SettingInvalid("--model", "", f"a key, as no model is loaded; known: {', '.join(keys) or 'none'}")
    model = (loaded or keys)[0]
    print_status(f"model: {model}")
    return model


async def choose_embedding_model(client: ChatClient) -> str:
    """The first embedding model, one that is loaded before others. Logged on stderr.

    Raises SettingInvalid where the server states none, and what ChatClient.models() raises.
    """
    cards = [card for card in await client.models() if card.is_embedding]
    if not cards:
        raise SettingInvalid("--model", "", "the key of an embedding model, as the server names none")
    model = next((card.key for card in cards if card.state == "loaded"), cards[0].key)
    print_status(f"model: {model}")
    return model


def conclude(error: ClientError | OSError) -> int:
    """Print the error in one line on stderr; the exit status for it. A closed stdout (as by `| head`) is no error."""
    if isinstance(error, OSError):
        # What stdout still buffers can't be written; the interpreter would try once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        return 0
    print_error(error)
    return {SettingInvalid: 2, ServerUnreachable: 3, ServerSilent: 3}.get(type(error), 1)
