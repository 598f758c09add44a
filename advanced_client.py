"""Advanced client of this server or any OpenAI-compatible one: a shell, comparisons, benchmarks.

Rule 1: run() does the work and raises; main() catches and returns the exit status.
Rule 2: results go to stdout, plain where it is no terminal; progress, thinking and errors go to stderr.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below ends it without a traceback

import asyncio
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections import ChainMap
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlxserver.client import transcript, views
from mlxserver.client.api import ChatClient
from mlxserver.client.bench.command import benchmark, interference
from mlxserver.client.bench.options import add_options
from mlxserver.client.command import (
    accept_any_text,
    add_connection_options,
    choose_model,
    client_of,
    conclude,
    read_prompt,
)
from mlxserver.client.compare_views import (
    format_answer,
    format_figures,
    format_markdown,
    format_plain,
    format_side_by_side,
    live_replies,
)
from mlxserver.client.conversation import Conversation
from mlxserver.client.defaults import EXIT_STATUSES, INTERRUPTED
from mlxserver.client.errors import ClientError, SettingInvalid
from mlxserver.client.events import Event, Reasoning
from mlxserver.client.images import Content, content_of, read_image
from mlxserver.client.live import LiveAnswer
from mlxserver.client.models import Wait
from mlxserver.client.printer import AnswerPrinter
from mlxserver.client.reply import Reply, ask, compare
from mlxserver.client.shell.loop import run_shell
from mlxserver.client.shell.measuring import split_keys
from mlxserver.client.shell.session import Session
from mlxserver.client.shell.settings import VIEWS, read_parameter
from mlxserver.client.transcript import quote_file

DESCRIPTION = """Talk with models, compare them, measure them.

Without a PROMPT, in a terminal, this is a shell: /help lists its commands. With a PROMPT, as the argument or piped in,
it is one answer. Every other command of the shell has a flag here."""


def parse_arguments() -> Namespace:
    """Parse the command line. Wrong usage is an error on stderr and exit status 2."""
    parser = ArgumentParser(
        description=DESCRIPTION, epilog=EXIT_STATUSES, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to ask")
    act = parser.add_argument_group("what to do, instead of a conversation").add_mutually_exclusive_group()
    act.add_argument("--models", action="store_true", help="list the models")
    act.add_argument("--load", metavar="SOURCE", help="load a model: a Hugging Face id, or a path on the server")
    act.add_argument("--unload", metavar="KEY", help="unload a model when its requests are done")
    act.add_argument("--compare", metavar="KEY,KEY", help="ask several models the same PROMPT")
    act.add_argument("--benchmark", metavar="KEY,KEY", help="measure models under load")
    act.add_argument("--interference", metavar="A,B", help="measure how much A slows down while B works")
    _add_request_options(parser)
    _add_output_options(parser)
    add_options(parser.add_argument_group("benchmarks"))
    add_connection_options(parser)
    arguments = parser.parse_args()
    if arguments.key is not None and arguments.load is None:
        parser.error("--key belongs to --load")
    no_prompt = ("models", "load", "unload", "benchmark", "interference")
    if arguments.prompt is not None and any(getattr(arguments, name) for name in no_prompt):
        parser.error(f"a PROMPT can't be given with {', '.join('--' + name for name in no_prompt)}")
    return arguments


def _add_request_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--model", metavar="KEY", help="the model to ask (default: the first that is loaded)")
    group.add_argument("--key", help="the key that --load gives to the model")
    group.add_argument("--system", metavar="TEXT", help="a system message")
    group.add_argument("--set", metavar="NAME=VALUE", type=_parameter, action="append", default=[], dest="params")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens of an answer")
    group.add_argument("--file", metavar="PATH", type=Path, action="append", default=[], help="put before the PROMPT")
    group.add_argument("--image", metavar="FILE", type=Path, action="append", default=[], help="shown with the PROMPT")
    group.add_argument("--open", metavar="FILE", type=Path, help="continue a conversation from .json or .md")


def _add_output_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--stream", choices=("on", "off"), default="on", help="stream answers, or print them whole")
    group.add_argument("--think", choices=VIEWS, default="show", help="how thinking is shown")
    group.add_argument("--save", metavar="FILE", type=Path, help="write the conversation as .json or .md")
    group.add_argument("--sequential", action="store_true", help="with --compare: one model after the other")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for a program to read")
    form.add_argument("--markdown", action="store_true", help="with --compare: a Markdown document")


def _parameter(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return read_parameter(name if equals else "", value)
    except SettingInvalid as error:
        raise ArgumentTypeError(str(error)) from error


async def run(arguments: Namespace) -> bool:
    """Run the command; whether all of it succeeded. Raises ClientError, and OSError of the standard streams."""
    acts = {"load": load, "unload": unload, "compare": compare_, "benchmark": measure, "interference": measure}
    act = list_models if arguments.models else converse
    for name, named in acts.items():
        act = named if getattr(arguments, name) is not None else act
    async with client_of(arguments) as client:
        return await act(arguments, client)


async def list_models(arguments: Namespace, client: ChatClient) -> bool:
    """--models."""
    cards = await client.models()
    if arguments.json:
        views.print_line(json.dumps([dict(card.fields) for card in cards], indent=2))
    else:
        views.print_models(cards)
    return True


async def load(arguments: Namespace, client: ChatClient) -> bool:
    """--load."""
    loaded = await views.load_with_bar(client, views.console(stderr=True), arguments.load, arguments.key)
    views.print_line(json.dumps(dict(loaded.fields)) if arguments.json else views.format_loaded(loaded))
    return True


async def unload(arguments: Namespace, client: ChatClient) -> bool:
    """--unload."""
    unloaded = await client.unload(arguments.unload)
    views.print_line(json.dumps(dict(unloaded.fields)) if arguments.json else views.format_unloaded(unloaded))
    return True


async def compare_(arguments: Namespace, client: ChatClient) -> bool:
    """--compare."""
    prompt = read_prompt(arguments.prompt)
    if prompt is None:
        raise SettingInvalid("PROMPT", "", "text as the argument or on stdin")
    replies = [Reply(model) for model in split_keys("--compare", arguments.compare)]
    messages = opening(arguments).asking(content(arguments, prompt))
    console = views.console(stderr=True)
    with live_replies(console, replies) if console.is_terminal else nullcontext():
        await compare(client, replies, messages, sequential=arguments.sequential, **parameters(arguments))
    stdout = views.console()
    if arguments.json:
        views.print_line(json.dumps([reply.to_object() for reply in replies], indent=2))
    elif arguments.markdown:
        views.print_line(format_markdown(replies).rstrip("\n"))
    elif stdout.is_terminal:
        stdout.print(format_side_by_side(replies, format_answer), format_figures(replies, stdout.width))
    else:
        views.print_line(format_plain(replies).rstrip("\n"))
    return not any(reply.error for reply in replies)


async def measure(arguments: Namespace, client: ChatClient) -> bool:
    """--benchmark and --interference."""
    act, keys = (
        (benchmark, arguments.benchmark) if arguments.benchmark is not None else (interference, arguments.interference)
    )
    models = split_keys("models", keys)
    return await act(client, arguments, models, parameters(arguments), as_json=arguments.json)


async def converse(arguments: Namespace, client: ChatClient) -> bool:
    """One answer to the PROMPT; without one, the shell."""
    prompt = read_prompt(arguments.prompt)
    stdout = views.console()
    if prompt is None and not stdout.is_terminal:
        raise SettingInvalid("PROMPT", "", "text as the argument or on stdin, as stdout is no terminal")
    model = arguments.model or await choose_model(client)
    if prompt is not None:
        return await answer(arguments, client, model, content(arguments, prompt))
    session = Session(client, stdout, model, opening(arguments), parameters(arguments))
    session.streams, session.thinking = arguments.stream == "on", arguments.think
    session.attached = [quote_file(path) for path in arguments.file]
    session.images = [read_image(path) for path in arguments.image]
    await run_shell(session)
    if arguments.save:
        transcript.save(arguments.save, session.conversation)
    return True


async def answer(arguments: Namespace, client: ChatClient, model: str, asked: Content) -> bool:
    """Print one answer."""
    conversation, reply = opening(arguments), Reply(model)

    async def fill(show: Callable[[Event], None], show_progress: Callable[[Wait], None] = lambda _: None) -> None:
        await ask(
            client,
            reply,
            conversation.asking(asked),
            stream=arguments.stream == "on",
            on_event=show,
            on_progress=show_progress,
            **parameters(arguments),
        )

    if arguments.json:
        await fill(lambda event: None)
        views.print_line(json.dumps(reply.to_object(), indent=2))
    elif views.console().is_terminal:
        with LiveAnswer(views.console(), arguments.think) as shown:
            await fill(shown.write, shown.show_progress)
        if reply.timing:
            views.print_status(views.format_status(model, reply.timing, None))
    else:
        await fill_plainly(fill, arguments.think)
    if arguments.save:
        transcript.save(arguments.save, conversation.with_turn(asked, reply.content))
    return True


async def fill_plainly(
    fill: Callable[[Callable[[Event], None], Callable[[Wait], None]], Awaitable[None]], thinking: str
) -> None:
    """Print the answer to stdout as it is, and the thinking, if it is to be shown, to stderr."""
    printer = AnswerPrinter()

    def show(event: Event) -> None:
        if thinking == "show" or not isinstance(event, Reasoning):
            printer.write(event)

    try:
        await fill(show, printer.show_progress)
    finally:
        printer.end()


def opening(arguments: Namespace) -> Conversation:
    """The conversation before the PROMPT. Raises FileUnusable."""
    conversation = transcript.load(arguments.open) if arguments.open else Conversation()
    return conversation if arguments.system is None else conversation.with_system(arguments.system)


def content(arguments: Namespace, prompt: str) -> Content:
    """The PROMPT after the images and the files. Raises FileUnusable."""
    question = "\n\n".join([*map(quote_file, arguments.file), prompt])
    return content_of(question, [read_image(path) for path in arguments.image])


def parameters(arguments: Namespace) -> dict[str, Any]:
    """The parameters of every request."""
    named = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    return {name: value for name, value in named.items() if value is not None} | dict(ChainMap(*arguments.params))


def main() -> int:
    """The command, from its arguments to its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = parse_arguments()
    accept_any_text()
    try:
        return 0 if asyncio.run(run(arguments)) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ClientError, OSError) as error:
        return conclude(error)


if __name__ == "__main__":
    sys.exit(main())
