"""`mlx-server`, and `python -m mlxserver`: a command, or else the server, which is imported only for it."""

from __future__ import annotations

import signal
import sys

from mlxserver.cli.command import is_command
from mlxserver.cli.command import main as run
from mlxserver.config.settings import Settings


def main() -> int:
    """Run the command line; the exit status."""
    run_command()
    import mlx_api_server

    return mlx_api_server.main()


def run_command() -> None:
    """Run the command line and exit, if it is a command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports that follow ends it without a traceback
    if is_command(sys.argv[1:]):
        sys.exit(run(sys.argv[1:], _read_settings))


def _read_settings(arguments: list[str]) -> Settings:
    import mlx_api_server  # here, because commands need it only where no server runs

    return mlx_api_server.read_settings(arguments)


if __name__ == "__main__":
    sys.exit(main())
