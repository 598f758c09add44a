"""The first screen of a server, on a terminal and in a pipe; who holds a port that is taken; the command config."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import mlx_api_server
from tools.harness.running_server import ROOT, run_server, running_server

COMMAND = [sys.executable, str(ROOT / "mlx_api_server.py")]
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def flags(scripted_path, tmp_path_factory):
    wide = tmp_path_factory.mktemp("model") / "wide"
    wide.symlink_to(scripted_path)
    return (
        "--no-defaults",
        *("--model", f"talker={scripted_path},preload=true,aliases='gpt-4o,small'"),
        *("--model", f"other={wide}"),
        *("--model", "far=org/never-downloaded"),
        *("--prefix-cache-disk-bytes", "0"),
    )


def screen(lines):
    """The first screen, up to its last line to try."""
    shown = []
    for line in lines:
        shown.append(line.rstrip("\r\n"))
        if "advanced_client" in line:
            return shown
    raise AssertionError(shown)


@pytest.fixture(scope="module")
def server(flags):
    with running_server(*flags) as server:
        yield server


def test_the_first_screen_has_what_fits_and_three_lines_to_try(server):
    shown = screen(server.process.stdout)
    text = "\n".join(shown)
    assert re.search(r"Models \([\d.]+ [GM]B of [\d.]+ GB in use\):", text)
    assert re.search(r"talker +loaded +[\d.]+ [GM]B +/", text)
    assert re.search(r"other +unloaded +[\d.]+ [GM]B: fits +/", text)
    assert re.search(r"far +unloaded +downloaded when asked for +org/never-downloaded", text)
    assert [line.split()[0] for line in shown[-3:]] == ["curl", shown[-2].split()[0], shown[-1].split()[0]]
    assert f"curl -s {server.url}/v1/chat/completions" in shown[-3]
    for line in shown[-3:-1]:
        tried = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert tried.returncode == 0, tried.stderr
    assert ESCAPE not in text


def test_a_model_that_needs_the_room_of_others_or_never_fits_is_shown_as_such(flags):
    with running_server(*flags, "--memory-limit", "1MB", "--page", "false") as server:
        shown = "\n".join(screen(server.process.stdout))
    assert "In a browser" not in shown
    assert re.search(r"other +unloaded +[\d.]+ [GM]B: does not fit", shown)


def test_on_a_terminal_it_is_the_same_plain_lines_as_wide_as_it_is(flags):
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "--port", "0", *flags], cwd=ROOT, encoding="utf-8", timeout=60)
    try:
        child.expect("Serving on http://127.0.0.1:")
        child.expect(r"In a browser: http://127.0.0.1:\d+/\r\n")
        child.expect("advanced_client.py .*\n")
        assert ESCAPE not in child.before + child.after
        models = [line for line in child.before.splitlines() if "loaded" in line]
        assert len(models) == 3
        assert all(len(line) <= 80 for line in models), models
        child.sendintr()
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0


def test_a_second_server_says_which_one_holds_its_port(server):
    ended = run_server("--no-defaults", "--port", str(server.port))
    assert ended.status == 1
    assert "a Multi-Model MLX Server with talker, other, far runs on 127.0.0.1:" in ended.stderr
    assert f", pid {server.process.pid})" in ended.stderr
    assert f"use that one, stop it with `kill {server.process.pid}`, or take another port: --port" in ended.stderr


def test_another_program_on_the_port_is_named_even_if_it_answers_nothing():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_server("--no-defaults", "--port", port)
    assert (ended.status, len(ended.stderr.splitlines())) == (1, 1)
    assert port in ended.stderr and "is taken by another program" in ended.stderr
    if Path("/proc/net/tcp").exists():
        assert "pid " in ended.stderr


def test_the_settings_that_config_prints_are_those_it_was_given(tmp_path, monkeypatch, capsys):
    def printed(*arguments):
        """What the command prints in this process, which has imported all of it already, and its exit status."""
        monkeypatch.setattr(sys, "argv", [COMMAND[1], "config", *arguments])
        status = mlx_api_server.main()
        return capsys.readouterr().out, status

    arguments = ["--port", "9000", "--model", "qwen=org/name,context_length=65536,pin=true"]
    first = subprocess.run([*COMMAND, "config", *arguments], capture_output=True, text=True, check=True)
    path = tmp_path / "models.toml"
    path.write_text(first.stdout)
    assert printed("--config", str(path)) == (first.stdout, 0)
    assert '[models.qwen]\nsource = "org/name"\ncontext_length = 65536\npin = true' in first.stdout
    settings = json.loads(printed("--json", *arguments)[0], parse_constant=pytest.fail)
    assert (settings["port"], settings["ttl"], settings["models"]["qwen"]["pin"]) == (9000, None, True)
    assert printed("--port", "x") == ("", 2)
