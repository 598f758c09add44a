"""`mlx-server launch` as a process, with a program on the PATH that records what it is started with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxserver.client.launch.programs import PROGRAMS
from tests.support.scripted_server import scripted_server
from tools.harness.running_server import eventually

ROOT = Path(__file__).parent.parent.parent
LAUNCH = [
    sys.executable,
    "-c",
    "import sys; from mlxserver.client.launch.command import main; sys.exit(main(sys.argv[1:]))",
]
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys, time
files = [os.environ.get("OPENCODE_CONFIG", ""), *sys.argv[1:]]
texts = [pathlib.Path(name).read_text() for name in files if name.startswith("/") and pathlib.Path(name).is_file()]
here = {{"arguments": sys.argv[1:], "variables": dict(os.environ), "texts": texts, "directory": os.getcwd()}}
pathlib.Path(os.environ["RECORD"]).write_text(json.dumps(here))
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(7)
"""
UNSET = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENCODE_CONFIG")


@pytest.fixture(scope="module")
def server():
    with scripted_server() as server:
        yield server


@pytest.fixture
def environment(tmp_path):
    """Of a user with an empty home directory, and a PATH that has the recorder alone under a program's name."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    own = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return kept | own | {"RECORD": str(tmp_path / "record.json"), "PYTHONPATH": str(ROOT)}


def install(environment, name):
    program = Path(environment["PATH"]) / name
    program.write_text(RECORDER)
    program.chmod(0o755)


def launch(server, environment, *arguments, command=LAUNCH):
    place = arguments.index("--") if "--" in arguments else len(arguments)
    options = ("--base-url", server.url)
    return subprocess.run(
        [*command, *arguments[:place], *options, *arguments[place:]],
        env=environment,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_program_is_started_with_a_configuration_of_its_own(server, environment):
    install(environment, "opencode")
    done = launch(server, environment, "opencode", "--model", "sleeper", "--", "run", "a task")
    assert done.returncode == 7, done.stderr
    record = json.loads(Path(environment["RECORD"]).read_text())
    assert record["arguments"] == ["-m", "local/sleeper", "run", "a task"]
    assert record["directory"] == environment["HOME"]
    (text,) = record["texts"]
    provider = json.loads(text)["provider"]["local"]
    assert provider["options"] == {"baseURL": f"{server.url}/v1", "apiKey": "none"}
    assert set(provider["models"]) == {"sleeper"}
    assert [*Path(environment["HOME"]).iterdir()] == [*Path(environment["TMPDIR"]).iterdir()] == []


def test_a_program_gets_the_key_and_the_first_loaded_model(server, environment):
    install(environment, "claude")
    assert launch(server, environment, "claude", "--api-key", "sesame").returncode == 7
    variables = json.loads(Path(environment["RECORD"]).read_text())["variables"]
    assert variables["ANTHROPIC_BASE_URL"] == server.url
    assert variables["ANTHROPIC_AUTH_TOKEN"] == "sesame"
    assert variables["ANTHROPIC_MODEL"] == variables["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "talker"


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_lines_to_set_are_printed(server, environment, name):
    install(environment, PROGRAMS[name].command[0])
    done = launch(server, environment, name, "--print", "--api-key", "sesame", "--", "extra")
    assert done.returncode == 0, done.stderr
    assert "talker" in done.stdout
    assert server.url in done.stdout
    assert done.stdout.splitlines()[-1].endswith(" extra") or PROGRAMS[name].setup
    assert "sesame" not in done.stdout
    assert "{" not in done.stdout.replace("{\n", "") or PROGRAMS[name].files
    assert not Path(environment["RECORD"]).exists()


def test_the_settings_are_printed_as_json(server, environment):
    done = launch(server, environment, "opencode", "--json", "--api-key", "sesame", "--", "extra")
    settings = json.loads(done.stdout)
    assert settings["command"][-1] == "extra"
    assert settings["files"].keys() == {"opencode.json"}
    assert "sesame" not in done.stdout


def test_a_program_that_is_not_installed_is_named_beside_its_lines(server, environment):
    done = launch(server, environment, "aider")
    assert done.returncode == 1
    assert launch(server, environment, "aider", "--print").returncode == 0
    assert f"export OPENAI_API_BASE={server.url}/v1" in done.stdout
    assert "Nothing was started: aider is not installed (pip install aider-chat)." in done.stderr


def test_a_program_whose_own_settings_would_change_is_not_started(server, environment):
    install(environment, "cline")
    done = launch(server, environment, "cline")
    assert done.returncode == 0
    assert f"--baseurl {server.url}/v1" in done.stdout
    assert not Path(environment["RECORD"]).exists()


def test_ctrl_c_is_the_programs(server, environment):
    """The terminal sends it to both; the launcher stays until the program ends, and cleans up."""
    install(environment, "opencode")
    command = [*LAUNCH, "opencode", "--base-url", server.url, "--", "--wait"]
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as process:
        eventually(lambda: Path(environment["RECORD"]).exists())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        assert b"launch" not in process.stderr.read()  # no traceback of its own
    assert [*Path(environment["TMPDIR"]).iterdir()] == []


def test_wrong_usage_and_no_server_have_their_exit_statuses(server, environment):
    assert launch(server, environment, "emacs").returncode == 2
    unknown = launch(server, environment, "aider", "--model", "missing")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    server.url, kept = "http://127.0.0.1:1", server.url
    try:
        assert launch(server, environment, "aider").returncode == 3
    finally:
        server.url = kept


def test_the_servers_command_line_launches(server, environment):
    command = [sys.executable, str(ROOT / "mlx_api_server.py"), "launch"]
    done = launch(server, environment, "continue", "--print", command=command)
    assert done.returncode == 0, done.stderr
    assert "cn --config ./continue.yaml" in done.stdout
