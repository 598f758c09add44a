"""`mlx-server COMMAND`: models and machine, with a running server and without one.

Rule 1: results go to stdout, as a table in a terminal, as lines with tabs elsewhere, and as JSON with --json; all else
        goes to stderr. The exit statuses are those of the clients (client/defaults.py), and 1 where something is
        missing.
Rule 2: the command line is read before anything else is imported; the server is imported only where none answers.
"""

from __future__ import annotations

import difflib
import signal
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from mlxserver.cli.parser import NAMES, parser

if TYPE_CHECKING:
    from mlxserver.config.settings import Settings

HELP = (["-h"], ["--help"], ["help"])
SERVER = ("serve", "config")  # what is not a command of this package

ReadSettings = Callable[[list[str]], "Settings"]


def is_command(arguments: Sequence[str]) -> bool:
    """Whether a command line of mlx-server is for main()."""
    if [*arguments] in HELP:
        return True
    return bool(arguments) and not arguments[0].startswith("-") and arguments[0] not in SERVER


def main(arguments: Sequence[str], read_settings: ReadSettings) -> int:
    """Run a command; the exit status. read_settings: those of a server's command line."""
    if [*arguments[:1]] == ["launch"]:
        from mlxserver.client.launch import command

        signal.signal(signal.SIGINT, signal.default_int_handler)
        return command.main(arguments[1:])
    known = parser()
    if [*arguments] in HELP:
        known.print_help()
        return 0
    if arguments[0] not in NAMES:
        known.error(_unknown(arguments[0]))
    own = [*takewhile(lambda argument: argument != "--", arguments)]
    options = known.parse_args(own)
    if (rest := [*arguments[len(own) + 1 :]]) and options.command != "service":
        known.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "completions":
        from mlxserver.cli import completions

        print(completions.script(options.shell, known))
        return 0
    return _guarded(options, read_settings, rest)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, 1)
    return f"there is no command {name!r}; " + (
        f"is it {near[0]!r}?" if near else f"expected one of {', '.join(NAMES)}"
    )


def _guarded(options: Namespace, read_settings: ReadSettings, flags: list[str]) -> int:
    """Run a command; its errors in one line."""
    from mlxserver.client.command import accept_any_text, conclude
    from mlxserver.client.defaults import INTERRUPTED
    from mlxserver.client.errors import ClientError
    from mlxserver.client.views import print_error
    from mlxserver.config.errors import ConfigInvalid
    from mlxserver.engine.errors import EngineError

    accept_any_text()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if options.command == "service":
            from mlxserver.cli import service

            if flags:
                read_settings(flags)  # wrong ones are refused before they are written
            return service.main(options, flags)
        return _run(options, lambda: read_settings(["--config", options.config] if options.config else []))
    except (ClientError, OSError) as error:
        return conclude(error)
    except ConfigInvalid as error:
        print_error(error)
        return 2
    except EngineError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: Namespace, settings: Callable[[], Settings]) -> int:
    if options.command == "doctor":
        from mlxserver.cli import doctor

        return doctor.doctor(options, settings())
    if options.command == "pull":  # on the main thread, which Ctrl-C interrupts
        from mlxserver.cli import pull

        return pull.pull(options, settings)
    import asyncio

    from mlxserver.cli import models

    commands = {"ls": models.ls, "show": models.show, "ps": models.ps, "rm": models.rm, "search": models.search}
    return asyncio.run(commands[options.command](options, settings))
