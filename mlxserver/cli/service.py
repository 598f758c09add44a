"""`mlx-server service install | status | logs | remove`: the server as a service of this user.

Rule: what is written is one file, and what is run are the system's own commands: --dry-run prints both.
"""

from __future__ import annotations

import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Protocol

from mlxserver.cli.output import print_json
from mlxserver.client.errors import FileUnusable, SettingInvalid
from mlxserver.client.views import print_status

NAME = "mlx-server"
PATH_FLAGS = ("--config", "--model-dirs", "--prefix-cache-dir", "--api-key-file", "--admin-key-file")
UNITS = Path(__file__).parent / "units"
FOLDER = Path(__file__).parents[2]  # a checkout, or where packages are installed
LINES = 100  # of the log
# Variables of the shell that the service needs, too. Keys and tokens are not copied into a file.
COPIED = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "OLLAMA_MODELS", "MLX_SERVER_CACHE", "HTTPS_PROXY", "NO_PROXY")
LINGER = "It ends when you log out. To keep it running: loginctl enable-linger"


class Manager(Protocol):
    """A service manager of the system."""

    @property
    def unit(self) -> Path:
        """The file that describes the service to it."""

    def content(self, command: Sequence[str], variables: Mapping[str, str]) -> bytes:
        """The unit of a command line."""

    def commands(self, action: str) -> list[list[str]]:
        """What is run for an action; of the commands before the last one a failure changes nothing."""


@dataclass(frozen=True, slots=True)
class Systemd:
    """User units of systemd. home: of its configuration."""

    home: Path

    @property
    def unit(self) -> Path:
        """Path of the unit."""
        return self.home / "systemd" / "user" / f"{NAME}.service"

    def content(self, command: Sequence[str], variables: Mapping[str, str]) -> bytes:
        """A unit file."""
        lines = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in variables.items())
        text = Template((UNITS / f"{NAME}.service").read_text()).substitute(
            folder=str(FOLDER).replace("%", "%%"), command=" ".join(map(_quoted, command)), environment=lines
        )
        return text.encode()

    def commands(self, action: str) -> list[list[str]]:
        """Commands of systemctl and journalctl."""
        control = ["systemctl", "--user"]
        return {
            "install": [[*control, "daemon-reload"], [*control, "enable", NAME], [*control, "restart", NAME]],
            "status": [[*control, "--no-pager", "status", NAME]],
            "logs": [["journalctl", "--user", "--unit", NAME, "--lines", str(LINES), "--no-pager"]],
            "remove": [[*control, "disable", "--now", NAME], [*control, "daemon-reload"]],
        }[action]


@dataclass(frozen=True, slots=True)
class Launchd:
    """Agents of launchd. home: the user's. user: id."""

    home: Path
    user: int

    @property
    def unit(self) -> Path:
        """Path of the agent."""
        return self.home / "Library" / "LaunchAgents" / f"{NAME}.plist"

    @property
    def log(self) -> Path:
        """File with what the server logs."""
        return self.home / "Library" / "Logs" / f"{NAME}.log"

    def content(self, command: Sequence[str], variables: Mapping[str, str]) -> bytes:
        """A property list."""
        agent = plistlib.loads((UNITS / f"{NAME}.plist").read_bytes())
        agent |= {"ProgramArguments": [*command], "WorkingDirectory": str(FOLDER)}
        agent |= {"StandardOutPath": str(self.log), "StandardErrorPath": str(self.log)}
        agent["EnvironmentVariables"] = {**agent["EnvironmentVariables"], **variables}
        return plistlib.dumps(agent, sort_keys=False)

    def commands(self, action: str) -> list[list[str]]:
        """Commands of launchctl."""
        domain = f"gui/{self.user}"
        return {
            "install": [
                ["launchctl", "bootout", f"{domain}/{NAME}"],
                ["launchctl", "bootstrap", domain, str(self.unit)],
            ],
            "status": [["launchctl", "print", f"{domain}/{NAME}"]],
            "logs": [["tail", "-n", str(LINES), str(self.log)]],
            "remove": [["launchctl", "bootout", f"{domain}/{NAME}"]],
        }[action]


def main(options: Namespace, flags: Sequence[str]) -> int:
    """Do what is asked; the exit status, which is the last command's. flags: of the server. Raises ClientError."""
    manager = find_manager(os.environ, Path.home())
    content = None
    if options.action == "install":
        variables = {name: os.environ[name] for name in COPIED if os.environ.get(name)}
        content = manager.content([sys.executable, "-m", "mlxserver", "serve", *with_whole_paths(flags)], variables)
    elif flags:
        raise SettingInvalid("service", options.action, "install, where flags of the server follow")
    commands = manager.commands(options.action)
    if options.dry_run:
        return _print(options, manager.unit, content, commands)
    return _act(options, manager, content, commands)


def with_whole_paths(flags: Sequence[str]) -> list[str]:
    """Flags of the server with paths from the root on: the service starts in another directory than this one."""
    whole, flag = [], ""
    for word in flags:
        name, separator, value = word.partition("=")
        is_flag = word.startswith("--")
        if is_flag and separator:
            whole.append(f"{name}={_whole(name, value)}")
        else:
            whole.append(word if is_flag else _whole(flag, word))
        flag = word
    return whole


def _whole(flag: str, value: str) -> str:
    """The value of a flag, whose path it has from the root on."""
    if flag == "--model":
        key, _, source = value.partition("=")
        path, *rest = source.split(",")
        return f"{key}={','.join([str(Path(path).absolute()), *rest])}" if Path(path).exists() and path else value
    is_path = flag in PATH_FLAGS and value != "auto" and not value.startswith("~")
    return str(Path(value).absolute()) if is_path else value


def find_manager(environ: Mapping[str, str], home: Path) -> Manager:
    """The service manager of this machine. Raises FileUnusable without one."""
    path = environ.get("PATH")
    if sys.platform == "darwin" or (shutil.which("launchctl", path=path) and not shutil.which("systemctl", path=path)):
        return Launchd(home, os.getuid())
    if shutil.which("systemctl", path=path):
        return Systemd(Path(environ.get("XDG_CONFIG_HOME") or home / ".config"))
    raise FileUnusable("systemctl", "it is not there, and neither is launchctl; start the server with mlx-server serve")


def _act(options: Namespace, manager: Manager, content: bytes | None, commands: Sequence[Sequence[str]]) -> int:
    unit = manager.unit
    if options.action != "install" and not unit.exists():
        raise FileUnusable(str(unit), "there is no such service; mlx-server service install makes it")
    if content is not None:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_bytes(content)
        print_status(f"Wrote {unit}")
    done = [subprocess.run(command, check=False, capture_output=options.json, text=True) for command in commands]
    if options.action == "remove":
        unit.unlink()
        print_status(f"Removed {unit}")
    status = done[-1].returncode
    if options.json:
        output = "".join(each.stdout + each.stderr for each in done)
        print_json({"action": options.action, "unit": str(unit), "status": status, "output": output})
    elif options.action == "install" and not status:
        print_status(
            f"The server runs now, and is started with your session. {LINGER if 'systemd' in str(unit) else ''}"
        )
        print_status("Its output: mlx-server service logs")
    elif options.action == "install":
        print_status("The unit is there, but the service could not be started. Without it: mlx-server serve")
    return status


def _print(options: Namespace, unit: Path, content: bytes | None, commands: Sequence[Sequence[str]]) -> int:
    """Print what would be written and run."""
    lines = [shlex.join(command) for command in commands]
    if options.json:
        text = None if content is None else content.decode()
        return print_json({"action": options.action, "unit": str(unit), "content": text, "commands": lines})
    if content is not None:
        print(f"# {unit}:\n{content.decode()}")
    if options.action == "remove":
        lines.append(f"rm {shlex.quote(str(unit))}")
    print("\n".join(lines))
    return 0


def _quoted(text: str) -> str:
    """A word of a unit file. Source: systemd.service(5), systemd.syntax(7)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != text or " " in text or not text else text
