"""`mlx-server ls | show | ps | pull | rm | doctor`: models and machine, with a running server and without one.

Rule: results go to stdout, as a table in a terminal, as lines with tabs elsewhere, and as JSON with --json; all else
goes to stderr. The exit statuses are those of the clients (client/command.py), and 1 where something is missing.
"""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from mlxserver.cli import doctor, models, pull
from mlxserver.client.api import DEFAULT_BASE_URL
from mlxserver.client.command import EXIT_STATUSES, INTERRUPTED, accept_any_text, conclude
from mlxserver.client.errors import ClientError
from mlxserver.client.views import print_error
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.settings import Settings
from mlxserver.engine.errors import EngineError

ReadSettings = Callable[[list[str]], Settings]

COMMANDS = """commands:
  serve             serve models; what happens without a command (serve --help has its flags)
  launch PROGRAM    start a program with the settings that it needs for a server
  ls                the models: registered ones, and those on this machine
  show MODEL        one of them
  ps                the loaded ones
  pull REPO         download a model of the Hugging Face hub
  rm MODEL          remove a model's files from this machine
  doctor            what this machine has, what it measures, and what is missing"""


def main(arguments: Sequence[str], read_settings: ReadSettings) -> int:
    """Run a command; the exit status. read_settings: those of a server's command line."""
    accept_any_text()
    options = _parse(arguments)
    try:
        settings = read_settings(["--config", options.config] if options.config else [])
        if options.command == "pull":  # on the main thread, which Ctrl-C interrupts
            return pull.pull(options, settings)
        return asyncio.run(_run(options, settings))
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


async def _run(options: Namespace, settings: Settings) -> int:
    match options.command:
        case "ls":
            return await models.ls(options, settings)
        case "show":
            return await models.show(options, settings)
        case "ps":
            return await models.ps(options)
        case "rm":
            return await models.rm(options, settings)
        case _:
            return await asyncio.to_thread(doctor.doctor, options, settings)


def _parse(arguments: Sequence[str]) -> Namespace:
    """The command line. Wrong usage is an error on stderr and exit status 2."""
    parser = ArgumentParser(
        prog="mlx-server",
        usage="mlx-server [COMMAND] [OPTIONS]",
        description="Serve local models, and look after them.",
        epilog=f"{COMMANDS}\n\n{EXIT_STATUSES}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--base-url", metavar="URL", help=f"default: OPENAI_BASE_URL, else {DEFAULT_BASE_URL}")
    common.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    common.add_argument("--config", metavar="FILE", help="settings to use where no server runs")
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, meaning: str) -> ArgumentParser:
        return names.add_parser(name, help=meaning, description=meaning, parents=[common], allow_abbrev=False)

    command("ls", "The models: registered ones, and those on this machine.")
    command("show", "One model.").add_argument("model", metavar="MODEL")
    command("ps", "The models that are loaded, being loaded or leaving.")
    download = command("pull", "Download a model of the Hugging Face hub.")
    download.add_argument("model", metavar="REPO", help="org/name, or org/name@revision")
    download.add_argument("--force", action="store_true", help="download it although memory is too small for it")
    removal = command("rm", "Remove a model's files from this machine.")
    removal.add_argument("model", metavar="MODEL")
    removal.add_argument("--yes", action="store_true", help="do not ask")
    removal.add_argument("--force", action="store_true", help="unload the model first, if it is loaded")
    command("doctor", "What this machine has, what it measures, and what is missing.")
    return parser.parse_args([*arguments])
