"""Simple client of this server or any OpenAI-compatible one: one prompt, one answer, an exit status.

Rule 1: the answer alone goes to stdout; thinking, status and errors go to stderr.
Rule 2: run() does the work and raises; main() catches and returns the exit status.
Rule 3: a conversation holds what was shown. An answer that was stopped is kept as far as it came; one that was stopped
        before its first word, or failed, is dropped together with its question.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below ends it without a traceback

import asyncio
import json
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypeVar

from mlxserver.client import views
from mlxserver.client.api import ChatClient, Message
from mlxserver.client.command import (
    accept_any_text,
    add_connection_options,
    choose_embedding_model,
    choose_model,
    client_of,
    conclude,
    read_prompt,
)
from mlxserver.client.defaults import EXIT_STATUSES, INTERRUPTED
from mlxserver.client.errors import ClientError, SettingInvalid
from mlxserver.client.images import Part, content_of, read_image
from mlxserver.client.printer import AnswerPrinter

Result = TypeVar("Result")

DESCRIPTION = """Ask a model one question, or chat with it line by line.

The prompt is the argument, or what is piped in; given both, the pipe's text follows the argument after a blank line.
With neither, every line is a turn of one conversation: Ctrl-C stops an answer, Ctrl-D ends the conversation."""


def parse_arguments() -> Namespace:
    """Parse the command line. Wrong usage is an error on stderr and exit status 2."""
    parser = ArgumentParser(
        description=DESCRIPTION, epilog=EXIT_STATUSES, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to ask")
    parser.add_argument("--model", metavar="KEY", help="the model to ask (default: the first that is loaded)")
    parser.add_argument(
        "--stream", action=BooleanOptionalAction, help="stream the answer (default: where stdout is a terminal)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument(
        "--image", metavar="FILE", type=Path, action="append", default=[], help="shown with the PROMPT; may be repeated"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--list", action="store_true", help="list the models")
    act.add_argument("--embed", nargs="*", metavar="TEXT", help="make vectors of texts, or of the lines of stdin")
    act.add_argument("--load", metavar="SOURCE", help="load a model: a Hugging Face id, or a path on the server")
    act.add_argument("--unload", metavar="KEY", help="unload a model when its requests are done")
    parser.add_argument("--key", help="the key that --load gives to the model")
    parser.add_argument("--json", action="store_true", help="with --embed: one object, with texts and token counts")
    add_connection_options(parser)
    arguments = parser.parse_args()
    if arguments.key is not None and arguments.load is None:
        parser.error("--key belongs to --load")
    if arguments.json and arguments.embed is None:
        parser.error("--json belongs to --embed")
    if arguments.prompt is not None and (arguments.list or arguments.load is not None or arguments.unload is not None):
        parser.error("a PROMPT can't be given with --list, --load or --unload")
    return arguments


def run(arguments: Namespace) -> None:
    """Run the command. Raises ClientError, KeyboardInterrupt, and OSError of stdin and stdout."""
    if arguments.list:
        return views.print_models(call(arguments, ChatClient.models))
    if arguments.load is not None:
        loaded = call(arguments, lambda client: client.load(arguments.load, arguments.key))
        return views.print_line(views.format_loaded(loaded))
    if arguments.unload is not None:
        unloaded = call(arguments, lambda client: client.unload(arguments.unload))
        return views.print_line(views.format_unloaded(unloaded))
    if arguments.embed is not None:
        texts = arguments.embed or [line for line in sys.stdin.read().splitlines() if line.strip()]
        return views.print_line(embed(arguments, texts))
    images = [read_image(path) for path in arguments.image]
    prompt = read_prompt(arguments.prompt)
    if arguments.stream is None:
        arguments.stream = sys.stdout.isatty()
    arguments.model = arguments.model or call(arguments, choose_model)
    messages: list[Message] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if prompt is None:
        return converse(arguments, messages, images)
    return ask(arguments, [*messages, {"role": "user", "content": content_of(prompt, images)}], AnswerPrinter())


def embed(arguments: Namespace, texts: list[str]) -> str:
    """The vectors: a line of numbers per text, or one JSON object. Raises ClientError."""
    if not texts:
        raise SettingInvalid("--embed", "", "texts as arguments, or as lines on stdin")
    model = arguments.model or call(arguments, choose_embedding_model)
    made = call(arguments, lambda client: client.embed(texts, model))
    if arguments.json:
        pairs = [{"text": text, "embedding": vector} for text, vector in zip(texts, made.vectors, strict=True)]
        document = {"model": model, "embeddings": pairs, "prompt_tokens": made.prompt_tokens}
        return json.dumps(document, ensure_ascii=False, indent=2)
    return "\n".join(" ".join(f"{value:.6g}" for value in vector) for vector in made.vectors)


def converse(arguments: Namespace, opening: list[Message], images: list[Part]) -> None:
    """Turn after turn until Ctrl-D. An error before the first answer ends it; a later one is printed.

    images: shown with the first question that is answered.
    """
    arguments.stream, messages = True, opening
    views.print_status("Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    for line in typed_lines():
        question: Message = {"role": "user", "content": content_of(line, [] if messages is not opening else images)}
        printer = AnswerPrinter()
        try:
            ask(arguments, [*messages, question], printer)
        except KeyboardInterrupt:
            views.print_status("(stopped)")
        except ClientError as error:
            if messages is opening:
                raise
            views.print_error(error)
            continue
        if printer.content:
            messages = [*messages, question, {"role": "assistant", "content": printer.content}]


def ask(arguments: Namespace, messages: list[Message], printer: AnswerPrinter) -> None:
    """Print one answer. It has an event loop of its own, so Ctrl-C stops this answer and nothing else."""
    params = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}

    async def print_answer(client: ChatClient) -> None:
        printer.start()
        if not arguments.stream:
            for event in (await client.complete(messages, arguments.model, **params)).events:
                printer.write(event)
            return
        async with aclosing(
            client.stream(messages, arguments.model, on_progress=printer.show_progress, **params)
        ) as events:
            async for event in events:
                printer.write(event)

    try:
        call(arguments, print_answer)
    finally:
        printer.end()


def typed_lines() -> Iterator[str]:
    """Lines that are typed until Ctrl-D, without empty ones. Ctrl-C drops a line."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines once it is imported
    while True:
        try:
            line = input(_invite())
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line


def _invite() -> str:
    """The prompt of input(), which goes to stdout; to stderr instead where stdout is no terminal."""
    if sys.stdout.isatty():
        return "> "
    print("> ", end="", file=sys.stderr, flush=True)
    return ""


def call(arguments: Namespace, act: Callable[[ChatClient], Awaitable[Result]]) -> Result:
    """Run `act` with a client of the server; its result."""

    async def act_once() -> Result:
        async with client_of(arguments) as client:
            return await act(client)

    return asyncio.run(act_once())


def main() -> int:
    """The command, from its arguments to its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = parse_arguments()
    accept_any_text()
    try:
        run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, OSError) as error:
        return conclude(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
