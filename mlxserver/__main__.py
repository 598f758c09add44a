"""`mlx-server`, and `python -m mlxserver`: a command, or else the server, which is imported only for it.

The server takes seconds to import, so wrong flags and --help are answered before that.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from mlxserver.cli.command import is_command
from mlxserver.cli.command import main as run
from mlxserver.config import load
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.settings import Settings


def main() -> int:
    """Run the command line; the exit status."""
    run_command()
    import mlx_api_server

    return mlx_api_server.main()


def run_command() -> None:
    """Run the command line and exit, unless it is one of the server, and right."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports that follow ends it without a traceback
    arguments = sys.argv[1:]
    if is_command(arguments):
        sys.exit(run(arguments, _read_settings))
    try:
        _check(arguments)
    except ConfigInvalid as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _check(arguments: Sequence[str]) -> None:
    """Check a command line of the server; with -h, print its help and exit. Raises ConfigInvalid."""
    prints = [*arguments[:1]] == ["config"]
    flags = arguments[1:] if prints or [*arguments[:1]] == ["serve"] else arguments
    load.build([flag for flag in flags if not (prints and flag == "--json")], os.environ, Settings())


def _read_settings(arguments: list[str]) -> Settings:
    import mlx_api_server  # here, because commands need it only where no server runs

    return mlx_api_server.read_settings(arguments)


if __name__ == "__main__":
    sys.exit(main())
