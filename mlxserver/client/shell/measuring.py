"""Commands that compare and measure models."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from typing import NoReturn

from rich.table import Table
from rich.text import Text

from mlxserver.client.bench.command import benchmark
from mlxserver.client.bench.options import add_options
from mlxserver.client.compare_views import format_answer, format_figures, format_side_by_side, live_replies
from mlxserver.client.errors import SettingInvalid
from mlxserver.client.reply import Reply, compare
from mlxserver.client.shell.session import Session
from mlxserver.client.stats import summarise


async def compare_(session: Session, argument: str) -> None:
    """Send one question to several models and show the replies side by side; the conversation does not change."""
    keys, _, prompt = argument.partition(" ")
    question = prompt.strip() or session.asked
    models = split_keys("/compare", keys)
    if not question:
        raise SettingInvalid("/compare", argument, "a,b[,c] and a PROMPT, or a question before it")
    messages = session.conversation.cleared().asking(question)
    replies = [Reply(model) for model in models]
    try:
        with live_replies(session.stdout, replies):
            await compare(session.client, replies, messages, sequential=False, **session.params)
    finally:
        session.stdout.print(format_side_by_side(replies, format_answer))
        session.stdout.print(format_figures(replies, session.stdout.width))


async def bench(session: Session, argument: str) -> None:
    """Measure models under load; the current one if none is named."""
    parser = LineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("keys", nargs="?", default=session.model)
    add_options(parser)
    options = parser.parse_line(argument)
    await benchmark(session.client, options, split_keys("/bench", options.keys), session.params, as_json=False)


async def stats(session: Session, argument: str) -> None:
    """Show the figures of all answers of the session, one row per model."""
    table = Table("model", "answers", "tokens", "TTFT p50 ms", "tokens/s p50", box=None, pad_edge=False)
    for model, timings in session.timings.items():
        summary = summarise(timings)
        ttft = f"{summary.ttft.p50 * 1000:.0f}" if summary.ttft else "-"
        speed = f"{summary.tokens_per_second.p50:.1f}" if summary.tokens_per_second else "-"
        tokens = "-" if summary.tokens is None else str(summary.tokens)
        table.add_row(Text(model), str(summary.requests), tokens, ttft, speed)
    session.stdout.print(table if session.timings else Text("No answer yet.", "dim"))


def split_keys(name: str, keys: str) -> tuple[str, ...]:
    """Split keys at commas. name: of the option, for errors. Raises SettingInvalid if there is none."""
    models = tuple(key.strip() for key in keys.split(",") if key.strip())
    if not models:
        raise SettingInvalid(name, keys, "keys of models between commas")
    return models


class LineParser(ArgumentParser):
    """Argument parser for a line of the shell: wrong usage raises SettingInvalid instead of ending the process."""

    def parse_line(self, line: str) -> Namespace:
        """Parse the options of a line. Raises SettingInvalid."""
        try:
            return self.parse_args(shlex.split(line))
        except ValueError as error:
            raise SettingInvalid("/bench", line, f"whole quotes ({error})") from None

    def error(self, message: str) -> NoReturn:
        """Called by argparse for wrong usage. Never returns."""
        raise SettingInvalid("/bench", message, "[KEY,KEY] and the options of --benchmark")
