"""The server as a service of the user: what is written, and which commands of the system are run."""

import configparser
import json
import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from mlxserver.cli.service import Launchd, Systemd

DEPLOY = Path(__file__).parents[2] / "deploy"
FAKE = """#!/bin/sh
echo "$(basename $0) $*" >> "$LOG"
echo "output of $1"
case "$*" in *status*) exit 3;; esac
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home, and commands of the system that only write down how they are called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("systemctl", "journalctl", "launchctl"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "called"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def service(*arguments):
    return main(["service", *arguments], read_settings)


def called(home):
    path = home / "called"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_systemd(home, monkeypatch, capfd):
    unit = home / ".config" / "systemd" / "user" / "mlx-server.service"
    monkeypatch.setenv("HF_HOME", "/big disk/hf")
    assert service("status") == 1
    assert "mlx-server service install makes it" in capfd.readouterr().err
    assert service("install", "--", "--port", "8001") == 0
    assert called(home) == [
        "systemctl --user daemon-reload",
        "systemctl --user enable mlx-server",
        "systemctl --user restart mlx-server",
    ]
    text = unit.read_text()
    assert 'Environment="HF_HOME=/big disk/hf"' in text
    (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    assert shlex.split(line.removeprefix("ExecStart=")) == [
        sys.executable,
        "-m",
        "mlxserver",
        "serve",
        "--port",
        "8001",
    ]
    assert "loginctl enable-linger" in capfd.readouterr().err
    assert service("status") == 3
    assert service("logs") == 0
    assert called(home) == [
        "systemctl --user --no-pager status mlx-server",
        "journalctl --user --unit mlx-server --lines 100 --no-pager",
    ]
    capfd.readouterr()
    assert service("remove", "--json") == 0
    removed = json.loads(capfd.readouterr().out)
    assert (removed["status"], removed["unit"]) == (0, str(unit))
    assert not unit.exists()
    assert called(home) == ["systemctl --user disable --now mlx-server", "systemctl --user daemon-reload"]


def test_launchd(home, monkeypatch, capfd):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert service("install", "--", "--port", "8001") == 0
    agent = home / "Library" / "LaunchAgents" / "mlx-server.plist"
    content = plistlib.loads(agent.read_bytes())
    assert content["ProgramArguments"][1:] == ["-m", "mlxserver", "serve", "--port", "8001"]
    assert content["StandardErrorPath"] == str(home / "Library" / "Logs" / "mlx-server.log")
    bootout, bootstrap = called(home)
    assert bootout.startswith("launchctl bootout gui/") and bootstrap.endswith(str(agent))
    assert service("remove") == 0
    assert not agent.exists()


def test_paths_are_those_of_the_directory_where_the_command_was_typed(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "mine.gguf").touch()
    (home / "own.toml").write_text("")
    models = ("--model", "a=mine.gguf,context_length=4096", "--model=b=org/name")
    flags = ("--config", "own.toml", "--model-dirs=./models", "--prefix-cache-dir", "auto", *models)
    assert service("install", "--", *flags) == 0
    unit = (home / ".config" / "systemd" / "user" / "mlx-server.service").read_text()
    line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert shlex.split(line)[4:] == [
        "--config",
        f"{home}/own.toml",
        f"--model-dirs={home}/models",
        *("--prefix-cache-dir", "auto"),
        *("--model", f"a={home}/mine.gguf,context_length=4096", "--model=b=org/name"),
    ]


def test_a_dry_run_does_nothing(home, capfd):
    assert service("install", "--dry-run") == 0
    out = capfd.readouterr().out
    assert "ExecStart=" in out
    assert out.splitlines()[-1] == "systemctl --user restart mlx-server"
    assert service("remove", "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["commands"][0] == "systemctl --user disable --now mlx-server"
    assert called(home) == []
    assert not (home / ".config").exists()


def test_wrong_usage_is_refused_before_anything_is_written(home, capfd):
    assert service("install", "--", "--prot", "1") == 2
    assert service("status", "--", "--port", "1") == 2
    assert service("install", "--", "--port", "many") == 2
    with pytest.raises(SystemExit, match="2"):
        service("start")
    assert called(home) == []


def test_a_machine_without_a_service_manager(home, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert service("install") == 1
    assert "start the server with mlx-server serve" in capfd.readouterr().err


@pytest.mark.parametrize("word", ["a b", 'a"b', "a%b", "a$b", "a\\b"])
def test_any_flag_arrives_as_it_was_typed(tmp_path, word):
    """As systemd reads a unit: specifiers, then variables, then quotes."""
    text = Systemd(tmp_path).content(["server", word], {}).decode()
    (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    assert shlex.split(line.removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$")) == ["server", word]
    assert plistlib.loads(Launchd(tmp_path, 1).content(["server", word], {}))["ProgramArguments"] == ["server", word]


def test_the_units_agree_with_those_of_deploy(tmp_path):
    def section(text):
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str
        parser.read_string(text)
        return dict(parser["Service"])

    own = section(Systemd(tmp_path).content(["server"], {}).decode())
    deployed = section((DEPLOY / "systemd" / "mlx-server@.service").read_text())
    for name in ("Restart", "RestartSec", "TimeoutStopSec", "LimitNOFILE", "NoNewPrivileges", "ExecReload"):
        assert own[name] == deployed[name], name
    agent = plistlib.loads(Launchd(tmp_path, 1).content(["server"], {}))
    example = plistlib.loads((DEPLOY / "launchd" / "mlx-server.plist").read_bytes())
    for name in ("Label", "RunAtLoad", "KeepAlive", "ExitTimeOut", "SoftResourceLimits"):
        assert agent[name] == example[name], name


@pytest.mark.parametrize(("shell", "flag"), [("bash", "-n"), ("zsh", "-n"), ("fish", "-n")])
def test_completions_are_right_for_their_shell(shell, flag, tmp_path, capfd):
    assert main(["completions", shell], read_settings) == 0
    script = tmp_path / "script"
    script.write_text(capfd.readouterr().out)
    assert "pull" in script.read_text()
    if shutil.which(shell):
        subprocess.run([shell, flag, script], check=True)
    if shell == "zsh":  # whose list of words is not expanded
        assert 'show:*) words="$(mlx-server ls 2>/dev/null | cut -f1)";;' in script.read_text()
    if shell == "bash":
        typed = 'COMP_WORDS=(mlx-server service st); COMP_CWORD=2; _mlx_server; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f". {script}; {typed}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["status"]


COMPLETED = [
    ("", "ls launch serve config"),
    ("se", "search serve service"),
    ("--memory", "--memory-limit"),
    ("serve --idle", "--idle-connection-timeout"),
    ("config --js", "--json"),
    ("service st", "status"),
    ("launch cl", "claude cline"),
    ("show ti", "tiny:latest tiny:same"),
    ("rm --", "--yes --force --json"),
]


@pytest.mark.parametrize(("typed", "offered"), COMPLETED)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_is_typed_is_completed(shell, typed, offered, tmp_path, capfd):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    found = completed(shell, typed, tmp_path, capfd)
    assert set(offered.split()) <= found
    assert typed in ("", "rm --") or found == set(offered.split())


@pytest.mark.parametrize(("typed", "offered"), [("show tiny:la", {"latest"}), ("show tiny:", {"latest", "same"})])
def test_bash_completes_what_follows_a_colon_alone(typed, offered, tmp_path, capfd):
    assert completed("bash", typed, tmp_path, capfd) == offered


def test_names_of_models_are_not_run(tmp_path, capfd):
    assert completed("bash", "show $", tmp_path, capfd) == {"$(touch"}
    assert not (tmp_path / "pwned").exists()


def completed(shell, typed, folder, capfd):
    """What a shell offers behind `mlx-server `; bash divides words at colons."""
    assert main(["completions", shell], read_settings) == 0
    (folder / "script").write_text(capfd.readouterr().out)
    stub = folder / "mlx-server"
    stub.write_text("#!/bin/sh\nprintf 'tiny:latest\\t-\\ntiny:same\\t-\\n$(touch pwned)\\t-\\n'\n")
    stub.chmod(0o755)
    if shell == "fish":
        command = ["fish", "--private", "-c", f"source {folder / 'script'}; complete -C 'mlx-server {typed}'"]
    else:
        words = ["mlx-server", *shlex.split(typed.replace(":", " : "))] + [""] * (not typed or typed[-1] in " ")
        asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _mlx_server"
        command = ["bash", "-c", f'. {folder / "script"}; {asked}; printf "%s\\n" "${{COMPREPLY[@]}}"']
    own = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, check=True)
    return {line.split("\t")[0] for line in done.stdout.splitlines()} - {""}
