"""Command line of `mlx-server launch`. Light, because shell completions read it, too."""

from __future__ import annotations

from argparse import ArgumentParser

from mlxserver.client.defaults import DEFAULT_BASE_URL
from mlxserver.client.launch.programs import PROGRAMS

MEANING = (
    "Start a program with the settings that it needs for a server, or print them. What follows -- is the program's."
)


def parser() -> ArgumentParser:
    """The parser. Wrong usage is an error on stderr and exit status 2."""
    parser = ArgumentParser(prog="mlx-server launch", description=MEANING, allow_abbrev=False)
    parser.add_argument("program", choices=sorted(PROGRAMS), metavar="PROGRAM", help=", ".join(sorted(PROGRAMS)))
    parser.add_argument("--print", action="store_true", help="print the settings, and start nothing")
    parser.add_argument("--json", action="store_true", help="print the settings as JSON, and start nothing")
    parser.add_argument("--model", metavar="KEY", help="the model to use (default: the first that is loaded)")
    parser.add_argument("--base-url", metavar="URL", help=f"default: OPENAI_BASE_URL, else {DEFAULT_BASE_URL}")
    parser.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    return parser
