"""The commands of mlx-server about models, with a running server and without one."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pexpect
import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from mlxserver.cli.models import COLUMNS, FOUND_COLUMNS, SPARE, SPARE_OF_FOUND
from mlxserver.cli.output import print_rows
from mlxserver.cli.parser import COMMANDS
from mlxserver.engine.loading.kept_choices import CHOICES, Choice, KeptChoices
from tests.support.local_models import in_hub, in_lm_studio, in_ollama
from tools.harness.running_server import ROOT, eventually, running_server, server_environment
from tools.harness.tiny_gguf import write_tiny_gguf

NO_SERVER = "http://127.0.0.1:9/v1"


@pytest.fixture
def home(tmp_path, scripted_path):
    """A user's home directory with a model of each kind, and a damaged one."""
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    in_hub(tmp_path / "hub", "org/scripted", scripted_path)
    damaged = in_hub(tmp_path / "hub", "org/damaged", scripted_path)
    next(damaged.glob("snapshots/*/model.safetensors")).resolve().unlink()
    in_lm_studio(tmp_path / ".lmstudio" / "models", "publisher/studio", scripted_path)
    in_ollama(tmp_path / ".ollama" / "models", "tiny", "latest", gguf)
    in_ollama(tmp_path / ".ollama" / "models", "tiny", "same", gguf)
    return tmp_path


def variables(home):
    return {"HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "MLX_SERVER_LIBRARY": "true"}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(home, monkeypatch, capfd):
    """Runs a command in this process, as the user of that home directory."""
    for name, value in (server_environment() | variables(home)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*arguments, url=NO_SERVER):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        try:
            status = main(arguments, read_settings)
        except SystemExit as exit:
            status = exit.code
        return Done(status, *capfd.readouterr())

    return run


def rows(done):
    assert done.returncode == 0, done.stderr
    return {line.split("\t")[0]: line.split("\t") for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("width", "shown", "cut"),
    [
        (60, "model state kind memory fits", ""),
        (84, "model state kind memory context fits place", "…"),
        (120, "model alias state kind memory context fits place", ""),
    ],
)
def test_a_table_leaves_out_columns_before_it_cuts_them(monkeypatch, capfd, width, shown, cut):
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    one = ("publisher/name", "name", "loaded", "text", "-", "-", "-", "-", "18.0 GB", "8192", "after eviction")
    print_rows(COLUMNS, [(*one, "mlx-community/Mistral-7B")], SPARE)
    heading, row = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capfd.readouterr().out.splitlines())
    assert heading.split() == shown.split()
    assert all(value in row for value in ("publisher/name", "loaded", "18.0 GB", "after eviction", cut))
    assert len(row) <= width


def test_without_a_server_this_machines_models_are_listed_shown_and_removed(home, command):
    listed = command("ls")
    assert {"smollm2", "org/scripted", "publisher/studio", "tiny:latest"} <= rows(listed).keys()
    assert rows(listed)["publisher/studio"][1:5] == ["studio", "unloaded", "text", "mlx"]
    assert "no server" in listed.stderr
    assert "org/damaged can't be loaded: model.safetensors missing" in listed.stderr
    shown = rows(command("show", "studio"))
    assert shown["model"][1] == "publisher/studio"
    assert shown["architecture"][1] == "llama"
    damaged = json.loads(command("show", "org/damaged", "--json").stdout)
    assert "missing" in damaged["error"]
    unconfirmed = command("rm", "studio")
    assert (unconfirmed.returncode, "--yes" in unconfirmed.stderr) == (2, True)
    assert (home / ".lmstudio" / "models" / "publisher" / "studio").exists()
    for name in ("studio", "org/damaged", "tiny:latest"):
        assert command("rm", name, "--yes").returncode == 0
    assert not (home / ".lmstudio" / "models" / "publisher" / "studio").exists()
    assert [path.name for path in (home / "hub").iterdir()] == ["models--org--scripted"]
    assert len([*(home / ".ollama" / "models" / "blobs").iterdir()]) == 1  # the other tag's, too
    assert command("rm", "tiny:same", "--yes", "--json").returncode == 0
    assert [*(home / ".ollama" / "models" / "blobs").iterdir()] == []


def test_exit_statuses(command):
    assert command("show", "nothing").returncode == 1
    assert command("rm", "smollm2", "--yes").returncode == 1
    assert command("rm", "smollm2").returncode == 1  # nothing is asked where there is nothing to remove
    assert command("ps").returncode == 3
    assert command("ls", "--base-url", NO_SERVER).returncode == 3
    assert command("frobnicate").returncode == 2


def test_with_a_server_its_models_are_listed_and_removed(home, command):
    with running_server("--no-defaults", variables=variables(home)) as server:
        listed = json.loads(command("ls", "--json", url=server.url).stdout)
        assert listed["server"] == f"{server.url}/v1"
        assert {each["id"] for each in listed["data"] if each.get("error")} == {"org/damaged"}
        assert rows(command("ps", url=server.url)) == {}
        assert server.chat("studio", "hello").status == 200
        assert rows(command("ps", url=server.url))["publisher/studio"][1] == "loaded"
        refused = command("rm", "studio", "--yes", url=server.url)
        assert (refused.returncode, "is loaded" in refused.stderr) == (1, True)
        assert server.ask("DELETE", "/v1/models/studio").error["code"] == "model_loaded"
        assert server.ask("DELETE", "/v1/models/studio?force=perhaps").error["param"] == "force"
        assert server.ask("DELETE", "/v1/models/nothing").error["code"] == "model_not_found"
        assert command("rm", "studio", "--yes", "--force", url=server.url).returncode == 0
        assert server.get("/v1/models/studio").status == 404
        assert server.chat("studio", "hello").status == 404
        answer = server.ask("DELETE", "/v1/models/tiny:same").json
        assert answer == {"id": "tiny:same", "object": "model", "deleted": True, "freed_bytes": answer["freed_bytes"]}
        assert server.get("/v1/models/tiny").status == 200


def test_only_an_admin_removes_files(home, scripted_path):
    model = shutil.copytree(scripted_path, home / "own" / "mine")
    flags = ("--no-defaults", "--api-key", "generates", "--admin-key", "administers", "--model", f"mine={model}")
    with running_server(*flags, "--model-dirs", str(home / "own"), variables=variables(home)) as server:
        headers = {"Authorization": "Bearer generates"}
        assert server.ask("DELETE", "/v1/models/mine", headers=headers).status == 403
        assert model.exists()
        headers = {"Authorization": "Bearer administers"}
        assert server.ask("DELETE", "/v1/models/mine", headers=headers).status == 200
        assert not model.exists()


def test_the_doctor_reports_and_measures(command, home, monkeypatch):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(home / "cache"))
    choice = Choice("llama, 16 layers of 2048", "a machine", {"pad_slots": False}, {"pad_slots": 1.5})
    KeptChoices(home / "cache" / CHOICES).store("name", choice)
    done = command("doctor")
    assert done.returncode in (0, 1), done.stderr
    found = {line.split("\t")[1]: line.split("\t") for line in done.stdout.splitlines()}
    assert {"machine", "mlx", "back-end", "BLAS", "memory", "products", "reading"} <= found.keys()
    assert any(line[0] == "missing" for line in found.values()) == done.returncode
    assert all(len(line) == 4 for line in found.values() if line[0] == "missing")
    assert found["policy"][2] == "a machine: llama, 16 layers of 2048: pad_slots off, 1.50 times as fast"


def test_long_names_are_whole_in_any_terminal(monkeypatch, capfd):
    rows = [
        (
            "mlx-community/A-Model-Of-405B-Instruct-8bit-with-a-long-name",
            "8-bit",
            "405B",
            "1 GB",
            "2 GB",
            "never",
            "7",
            "yes",
        )
    ]
    for width in (120, 80, 40):
        for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
            monkeypatch.setenv(name, value)
        print_rows(FOUND_COLUMNS, rows, SPARE_OF_FOUND)
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capfd.readouterr().out.splitlines()]
        assert "".join(line.split(" ")[0] for line in lines[1:]) == rows[0][0]
        assert all(len(line) <= width and "…" not in line for line in lines)
        assert "never" in lines[1]


def test_ctrl_c_ends_the_question_of_a_removal(home):
    own = {**server_environment(), **variables(home), "OPENAI_BASE_URL": NO_SERVER, "TERM": "xterm"}
    command = [str(ROOT / "mlx_api_server.py"), "rm", "studio"]
    child = pexpect.spawn(sys.executable, command, env=own, encoding="utf-8", timeout=100)
    try:
        child.expect(r"\[y/N\]")
        child.sendintr()
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 130
    assert (home / ".lmstudio" / "models" / "publisher" / "studio").exists()


def test_a_removal_asks_in_a_terminal(home):
    import pty

    reader, terminal = pty.openpty()
    own = {**server_environment(), **variables(home), "OPENAI_BASE_URL": NO_SERVER, "COLUMNS": "200", "TERM": "xterm"}
    script = [sys.executable, str(ROOT / "mlx_api_server.py")]
    os.write(reader, b"n\n")
    done = subprocess.Popen([*script, "rm", "studio"], env=own, stdin=terminal, stdout=terminal, stderr=terminal)
    assert done.wait(100) == 1
    os.close(terminal)
    text = ""
    try:
        while received := os.read(reader, 65536):
            text += received.decode()
    except OSError:  # the other end is closed
        pass
    os.close(reader)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "Remove publisher/studio" in plain and "[y/N]" in plain
    assert (home / ".lmstudio" / "models" / "publisher" / "studio").exists()


IMPORTED = """
import sys
from mlxserver.__main__ import main
sys.argv = ["mlx-server", *sys.argv[1:]]
try:
    main()
except SystemExit as exit:
    print("status", exit.code)
print("imported", *{"aiohttp", "mlx", "huggingface_hub", "mlx_api_server", "model_manager"} & sys.modules.keys())
"""


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["--help"], "status 0\nimported"),
        (["ls", "--help"], "status 0\nimported"),
        (["completions", "zsh"], "status 0\nimported"),
        (["frobnicate"], "status 2\nimported"),
        (["pull"], "status 2\nimported"),
        (["serve", "--help"], "status 0\nimported"),
        (["--port", "70000"], "status 2\nimported"),
        (["config", "--frobnicate", "--json"], "status 2\nimported"),
        (["--config", "/no/such/file.toml"], "status 2\nimported"),
        (["ps"], "status 3\nimported aiohttp"),
    ],
)
def test_a_command_imports_what_it_needs(arguments, imported):
    own = {**server_environment(), "OPENAI_BASE_URL": NO_SERVER}
    command = [sys.executable, "-c", IMPORTED, *arguments]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(imported), done.stdout


def test_a_command_that_is_mistyped_is_guessed(command):
    assert "is it 'search'?" in command("serch").stderr


def test_every_command_is_explained():
    page = (ROOT / "docs" / "clients.md").read_text()
    names = re.findall(r"^  (\w+)", COMMANDS, re.MULTILINE)
    assert len(names) == 12
    assert [name for name in names if f"mlx-server {name}" not in page] == []


def test_policies_are_measured_where_the_setting_says_so(home, tiny_llama_path):
    own = {"MLX_SERVER_MEASURE_POLICIES": "true", "MLX_SERVER_CACHE": str(home / "cache")}
    flags = ("--no-defaults", "--model", f"tiny={tiny_llama_path},policy.pad_slots=true,preload=true")
    with running_server(*flags, variables=variables(home) | own) as server:
        eventually(lambda: list((home / "cache" / CHOICES).glob("*.json")))
        policy = server.get("/v1/models/tiny").json["policy"]
        assert (policy["pad_slots"], policy["fixed"], policy["measured"]) == (True, ["pad_slots"], [])
