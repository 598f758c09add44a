"""Command line of `mlx-server COMMAND`. It imports next to nothing: help and wrong usage are answered at once."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter

from mlxserver.client.defaults import DEFAULT_BASE_URL, EXIT_STATUSES

COMMANDS = """commands:
  serve             serve models, as without a command; serve --help has its flags
  launch PROGRAM    start a program with the settings that it needs for a server
  ls                the models: registered ones, and those on this machine
  show MODEL        one of them
  ps                the loaded ones
  search WORDS      find models on the Hugging Face hub
  pull REPO         download a model of the Hugging Face hub
  rm MODEL          remove a model's files from this machine
  config            print the settings as a file
  doctor            what this machine has, what it measures, and what is missing
  service ACTION    run the server as a service of this user
  completions SHELL print what makes a shell complete these commands"""
NAMES = [line.split()[0] for line in COMMANDS.splitlines()[1:]]

MOST_RESULTS = 100


def parser() -> ArgumentParser:
    """The parser of all commands. Wrong usage is an error on stderr and exit status 2."""
    parser = ArgumentParser(
        prog="mlx-server",
        usage="mlx-server [COMMAND] [OPTIONS]",
        description="Serve local models, and look after them.",
        epilog=f"{COMMANDS}\n\n{EXIT_STATUSES}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    printing = ArgumentParser(add_help=False, allow_abbrev=False)
    printing.add_argument("--json", action="store_true", help="print JSON")
    asking = ArgumentParser(add_help=False, allow_abbrev=False)
    asking.add_argument("--base-url", metavar="URL", help=f"default: OPENAI_BASE_URL, else {DEFAULT_BASE_URL}")
    asking.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    asking.add_argument("--config", metavar="FILE", help="settings to use where no server runs")
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="mlx-server", help=SUPPRESS)

    def command(name: str, meaning: str, *parents: ArgumentParser) -> ArgumentParser:
        return names.add_parser(
            name,
            description=meaning,
            parents=parents,
            epilog=EXIT_STATUSES,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    command("ls", "The models: registered ones, and those on this machine.", printing, asking)
    command("show", "One model.", printing, asking).add_argument("model", metavar="MODEL")
    command("ps", "The models that are loaded, being loaded or leaving.", printing, asking)
    search = command("search", "Find models for MLX on the Hugging Face hub.", printing, asking)
    search.add_argument("words", metavar="WORDS", nargs="+", help="parts of the name")
    search.add_argument("--limit", metavar="N", type=_results, default=20, help="most results (default 20)")
    download = command("pull", "Download a model of the Hugging Face hub.", printing, asking)
    download.add_argument("model", metavar="REPO", help="org/name, org/name@revision, or the address of its page")
    download.add_argument("--force", action="store_true", help="download it although it could not be loaded here")
    removal = command("rm", "Remove a model's files from this machine.", printing, asking)
    removal.add_argument("model", metavar="MODEL")
    removal.add_argument("--yes", action="store_true", help="do not ask")
    removal.add_argument("--force", action="store_true", help="unload the model first, if it is loaded")
    command("doctor", "What this machine has, what it measures, and what is missing.", printing, asking)
    service = command(
        "service",
        "Run the server as a service of this user: launchd's, or systemd's. Flags of the server follow behind --.",
        printing,
    )
    service.add_argument(
        "action",
        choices=("install", "status", "logs", "remove"),
        metavar="ACTION",
        help="install, status, logs, or remove",
    )
    service.add_argument("--dry-run", action="store_true", help="print what would be written and run")
    shells = command("completions", "Print what makes a shell complete these commands.")
    shells.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    return parser


def _results(text: str) -> int:
    if text.isdigit() and 1 <= int(text) <= MOST_RESULTS:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no number from 1 to {MOST_RESULTS}")
