"""`mlx-server launch PROGRAM`: starts a program with the settings that it needs for a server, or prints them.

Rule: nothing of the user's is written. Files go into a temporary directory, which is removed when the program ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlxserver.client.api import ChatClient
from mlxserver.client.command import choose_model, conclude
from mlxserver.client.defaults import INTERRUPTED
from mlxserver.client.errors import ClientError
from mlxserver.client.launch.options import parser
from mlxserver.client.launch.programs import PROGRAMS, Program
from mlxserver.client.views import print_status

NO_KEY = "none"  # for a server without keys: programs want one all the same
HIDDEN_KEY = "YOUR_KEY"
ASSUMED_CONTEXT = 32_768  # tokens, of a model that has not been loaded yet


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status, which is the program's where one was started."""
    try:
        return run(_parse(arguments))
    except ClientError as error:
        return conclude(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def run(options: Namespace) -> int:
    """Start the program or print its settings. Raises ClientError."""
    program = PROGRAMS[options.program]
    values = asyncio.run(_values(options))
    installed = shutil.which(program.command[0])
    hidden = {**values, "files": "."} | ({} if values["key"] == NO_KEY else {"key": HIDDEN_KEY})
    if options.json:
        print(json.dumps(_described(program, hidden, options.arguments), indent=2))
        return 0
    if options.print or program.setup or not installed:
        print("\n".join(lines(program, hidden, options.arguments)))
        if options.print or installed:
            return 0
        print_status(f"Nothing was started: {program.command[0]} is not installed ({program.package}).")
        return 1
    return start(program, installed, values, options.arguments)


def lines(program: Program, values: Mapping[str, str], arguments: Sequence[str] = ()) -> Iterator[str]:
    """The settings as lines for a shell, with the files as comments before them."""
    for name, text in program.files.items():
        yield f"# {name}:"
        yield from (f"#   {line}" for line in _fill(text, values).splitlines())
    for name, value in program.variables.items():
        yield f"export {name}={shlex.quote(_fill(value, values))}"
    for command in (*program.setup, (*program.command, *arguments)):
        yield shlex.join(_fill(part, values) for part in command)


def _described(program: Program, values: Mapping[str, str], arguments: Sequence[str]) -> dict[str, Any]:
    """The settings as a JSON object."""
    return {
        "program": program.name,
        "files": {name: _fill(text, values) for name, text in program.files.items()},
        "variables": {name: _fill(value, values) for name, value in program.variables.items()},
        "setup": [[_fill(part, values) for part in command] for command in program.setup],
        "command": [_fill(part, values) for part in (*program.command, *arguments)],
    }


def start(program: Program, installed: str, values: Mapping[str, str], arguments: Sequence[str] = ()) -> int:
    """Run the program to its end; its exit status. Ctrl-C is the program's alone."""
    with tempfile.TemporaryDirectory(prefix="mlx-server-") as directory:
        filled = {**values, "files": directory}
        for name, text in program.files.items():
            (Path(directory) / name).write_text(_fill(text, filled))
        variables = {name: _fill(value, filled) for name, value in program.variables.items()}
        command = [installed, *(_fill(part, filled) for part in program.command[1:]), *arguments]
        print_status(f"{program.name}: {values['model']} at {values['url']}")
        before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler, unlike SIG_IGN, is not inherited
        try:
            return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        finally:
            signal.signal(signal.SIGINT, before)


async def _values(options: Namespace) -> dict[str, str]:
    """What the placeholders stand for, from the server."""
    async with ChatClient(options.base_url, options.api_key) as client:
        model = options.model or await choose_model(client)
        card = await client.model(model)
        key = options.api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY
        return {
            "url": client.base_url,
            "root": client.base_url.removesuffix("/v1"),
            "model": model,
            "key": key,
            "context": str(card.context_length or ASSUMED_CONTEXT),
        }


def _fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _parse(arguments: Sequence[str]) -> Namespace:
    """The command line; what follows `--` is the program's. Wrong usage is an error on stderr and exit status 2."""
    own = [*takewhile(lambda argument: argument != "--", arguments)]
    return parser().parse_args(own, Namespace(arguments=[*arguments[len(own) + 1 :]]))
