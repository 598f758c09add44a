"""simple_client.py as a process: its streams, its terminal, its exit status."""

import codecs
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import pytest

import simple_client
from mlxserver.client.errors import KEY_HINT
from tests.support.scripted_server import CARDS, scripted_server
from tools.harness.running_server import server_environment

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "simple_client.py")]
SETTINGS = ("NO_COLOR", "FORCE_COLOR", "OPENAI_BASE_URL", "OPENAI_API_KEY")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"TERM": "xterm"}


@pytest.fixture(scope="module")
def server():
    with scripted_server() as server:
        yield server


def ran(url, *arguments, piped="", **environment):
    """Run with a pipe as stdin: (exit status, stdout, stderr)."""
    done = subprocess.run(
        [*COMMAND, "--base-url", url, *arguments],
        input=piped,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=ENVIRONMENT | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def main(server, monkeypatch, capsys):
    """The same in this process, which takes a tenth of the time, for what does not depend on a process."""

    def run_main(*arguments, piped=""):
        monkeypatch.setattr("sys.argv", ["simple_client.py", "--base-url", server.url, *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        try:
            status = simple_client.main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run_main


class Terminal:
    """Process on its own pseudo-terminal: its output and its input."""

    def __init__(self, arguments):
        self._end, process_end = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), process_end)
        self.process = subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, start_new_session=True, **streams)
        os.close(process_end)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def expect(self, text, within=60):
        """Wait until `text` is shown; the text before it. Both are dropped."""
        deadline = monotonic() + within
        while text not in self.shown:
            assert select.select([self._end], [], [], max(0, deadline - monotonic()))[0], (
                f"{text!r} not in {self.shown!r}"
            )
            self.shown += self._decoder.decode(os.read(self._end, 4096))
        before, self.shown = self.shown.split(text, 1)
        return before

    def type(self, text):
        os.write(self._end, text.encode())

    def stop_answer(self):
        self.process.send_signal(signal.SIGINT)
        self.expect("(stopped)")

    def interrupt_line(self):
        """Press Ctrl-C until there is a new prompt: readline ignores it before it waits for a key."""
        for _ in range(15):
            self.process.send_signal(signal.SIGINT)
            with suppress(AssertionError):
                return self.expect("> ", within=2)
        raise AssertionError(f"Ctrl-C did not lead to a new prompt: {self.shown!r}")

    def exit_status(self):
        return self.process.wait(60)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextmanager
def terminal(url, *arguments):
    shown = Terminal(["--base-url", url, *arguments])
    try:
        yield shown
    finally:
        shown.close()


def test_an_answer_goes_to_stdout_alone(server):
    for how in ([], ["--stream"]):
        assert ran(server.url, "--model", "talker", *how, "Capital?") == (0, "The capital is Paris.\n", "")


def test_thinking_goes_to_stderr(server):
    for how in ([], ["--stream"]):
        assert ran(server.url, "--model", "thinker", *how, "17 + 25?") == (0, "42\n", "17 + 25 is 42\n")


def test_the_options_become_the_request(server, main):
    options = ["--system", "Be brief.", "--max-tokens", "7", "--temperature", "0.5"]
    assert main("--model", "talker", *options, "Hi")[0] == 0
    assert server.requests[-1] == {
        "model": "talker",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 7,
        "temperature": 0.5,
    }


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["Hi"], "", "Hi"),
        ([], "from a pipe\n", "from a pipe"),
        (["Explain:"], "line 1\nline 2 é\n", "Explain:\n\nline 1\nline 2 é"),
    ],
)
def test_the_prompt_is_the_argument_then_a_blank_line_then_the_pipe(server, arguments, piped, prompt):
    assert ran(server.url, "--model", "talker", *arguments, piped=piped)[0] == 0
    assert server.requests[-1]["messages"] == [{"role": "user", "content": prompt}]


def test_an_empty_prompt_is_wrong_usage(main):
    status, out, err = main("--model", "talker", piped="\n")
    assert (status, out) == (2, "")
    assert err == "error: PROMPT: expected text as the argument or on stdin.\n"


def test_without_a_model_the_first_loaded_one_answers_and_is_named(server):
    assert ran(server.url, "Hi") == (0, "The capital is Paris.\n", "model: talker\n")


def test_without_a_model_and_with_none_loaded_the_only_one_answers():
    with scripted_server(cards=[{"id": "wordy", "status": {"value": "unloaded"}}]) as server:
        assert ran(server.url, "--stream", "Hi")[:2] == (0, "So\n")
    with scripted_server(cards=[CARDS[0], {**CARDS[0], "id": "other"}]) as server:
        status, out, err = ran(server.url, "Hi")
        assert (status, out) == (2, "")
        assert err.endswith("known: sleeper, other.\n")


def test_the_list_is_one_line_per_model_in_a_pipe_and_a_table_on_a_terminal(server):
    status, out, _ = ran(server.url, "--list")
    assert status == 0
    assert [line.split("\t")[:3] for line in out.splitlines()] == [
        ["sleeper", "unloaded", "thinking"],
        ["talker", "loaded", "instruction"],
    ]
    with terminal(server.url, "--list") as shown:
        assert "requests" in shown.expect("sleeper")
        assert shown.exit_status() == 0


def test_a_model_is_loaded_and_unloaded(server):
    assert ran(server.url, "--load", "org/new", "--key", "new") == (0, "Loaded new in 1.2 s.\n", "")
    assert ran(server.url, "--unload", "talker") == (
        0,
        "Unloaded talker: 3 requests completed, 0 aborted, 540.0 MB freed.\n",
        "",
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "unknown", "Hi"], "Model 'unknown' does not exist. Known models: sleeper, talker."),
        (["--unload", "unknown"], "Model 'unknown' does not exist. Known models: sleeper, talker."),
        (["--load", "org/broken"], "Model 'broken' could not be loaded: no weights."),
        (["--model", "gateway", "Hi"], "HTTP 502 (Bad Gateway): <html> <h1>Bad Gateway</h1>"),
        (
            ["--model", "early-leaver", "--stream", "Hi"],
            "The answer broke off: the stream ended without a finish_reason.",
        ),
        (["--model", "breaker", "--stream", "Hi"], "The answer broke off: The engine stopped."),
    ],
)
def test_an_error_of_the_server_is_one_line_and_exit_status_1(main, arguments, error):
    status, _, err = main(*arguments)
    assert (status, err) == (1, f"error: {error}\n")


def test_a_broken_answer_keeps_what_came_and_ends_its_line(server):
    assert ran(server.url, "--model", "breaker", "--stream", "Hi")[:2] == (1, "The cap\n")


def test_load_is_not_supported_by_a_server_without_it():
    with scripted_server(has_extensions=False) as server:
        status, _, err = ran(server.url, "--load", "org/new")
    assert (status, err) == (1, f"error: The server at {server.url}/v1 does not support /models/load (HTTP 405).\n")


def test_a_missing_server_is_one_line_and_exit_status_3():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        status, out, err = ran(url, "--list")
    assert (status, out, len(err.splitlines())) == (3, "", 1)
    assert err.startswith(f"error: No answer from a server at {url}: Connection refused. Start one with `make serve")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--key", "k", "Hi"],
        ["--list", "--unload", "talker"],
        ["--list", "Hi"],
        ["--max-tokens", "many", "Hi"],
        ["--base-url", "nowhere", "--list"],
    ],
)
def test_wrong_usage_is_exit_status_2(main, arguments):
    status, out, err = main(*arguments)
    assert (status, out) == (2, "")
    assert "error: " in err


def test_the_usage_names_the_program_that_was_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/mlx-chat", "--help"])
    with pytest.raises(SystemExit):
        simple_client.main()
    assert capsys.readouterr().out.startswith("usage: mlx-chat ")


def test_the_help_lists_the_exit_statuses(main):
    status, out, _ = main("--help")
    assert status == 0
    assert "130  interrupted" in out


def test_the_url_and_the_key_come_from_the_environment():
    with scripted_server(api_key="secret") as server:
        own = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "secret"}
        done = subprocess.run([*COMMAND, "--list"], capture_output=True, env=ENVIRONMENT | own, timeout=60)
        assert done.returncode == 0
        assert ran(server.url, "--list")[::2] == (1, f"error: Incorrect API key. {KEY_HINT}\n")


def test_a_closed_stdout_ends_it_without_an_error(server):
    """As with `| head -1`: no traceback, nothing on stderr."""
    command = [*COMMAND, "--base-url", server.url, "--model", "talker", "--stream", "Hi"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_text_that_stdout_cannot_encode_becomes_question_marks(server):
    how = ["--model", "smiler", "--stream", "Hi"]
    assert ran(server.url, *how) == (0, "é 🙂\n", "")
    assert ran(server.url, *how, PYTHONIOENCODING="ascii") == (0, "? ?\n", "")


def test_ctrl_c_stops_a_streamed_answer_with_exit_status_130(server):
    server.left.clear()
    command = [*COMMAND, "--base-url", server.url, "--model", "hanger", "--stream", "Hi"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout.read(3) == b"For"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"\n", b"")
    assert process.returncode == 130
    assert server.left.wait(60)


def test_a_conversation_sends_its_history_and_ends_with_ctrl_d(server):
    with terminal(server.url, "--model", "echo", "--system", "Be brief.") as shown:
        shown.expect("> ")
        shown.type("one\n")
        shown.expect('{"role": "user", "content": "one"}]')
        shown.expect("> ")
        shown.type("two\n")
        shown.expect('{"role": "user", "content": "two"}]')
        shown.expect("> ")
        shown.type("\x04")
        assert shown.exit_status() == 0
    first, second = (request["messages"] for request in server.requests[-2:])
    assert second == [*first, {"role": "assistant", "content": json.dumps(first)}, {"role": "user", "content": "two"}]


@pytest.mark.parametrize(("model", "kept"), [("hanger", [{"role": "user", "content": "one"}]), ("ponderer", [])])
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(server, model, kept):
    """The shown part of the answer is kept; an answer stopped in its thinking is dropped with its question."""
    with terminal(server.url, "--model", model) as shown:
        shown.expect("> ")
        shown.type("one\n")
        shown.expect("For" if kept else "Hm")
        shown.stop_answer()
        shown.expect("> ")
        shown.type("two\n")
        shown.expect("For" if kept else "Hm")
        shown.stop_answer()
        shown.expect("> ")
        shown.interrupt_line()
        shown.type("\x04")
        assert shown.exit_status() == 0
    answered = [*kept, {"role": "assistant", "content": "For"}] if kept else []
    assert server.requests[-1]["messages"] == [*answered, {"role": "user", "content": "two"}]


def test_the_load_that_an_answer_waits_for_is_shown_on_a_terminal_only(server):
    server.gate.clear()
    with terminal(server.url, "--model", "loader", "--stream", "Capital?") as shown:
        shown.expect("The model is being loaded: reading, 1.0 MB of 4.0 MB")
        shown.expect("\r")
        shown.expect("The model is being loaded: warming up")
        server.gate.set()
        assert shown.expect("The capital is Paris.").endswith("\r")
        assert shown.exit_status() == 0
    assert ran(server.url, "--model", "loader", "--stream", "Capital?") == (0, "The capital is Paris.\n", "")


def test_an_error_in_the_first_turn_ends_the_conversation(server):
    with terminal(server.url, "--model", "unknown") as shown:
        shown.expect("> ")
        shown.type("one\n")
        shown.expect("Model 'unknown' does not exist.")
        assert shown.exit_status() == 1


def test_a_killed_server_is_an_error_and_the_conversation_goes_on():
    with scripted_server() as server:
        shown = Terminal(["--base-url", server.url, "--model", "talker"])
        shown.expect("> ")
        shown.type("one\n")
        shown.expect("Paris.")
        shown.expect("> ")
    try:
        shown.type("two\n")
        shown.expect("Connection refused")
        shown.expect("> ")
        shown.type("\x04")
        assert shown.exit_status() == 0
    finally:
        shown.close()


@contextmanager
def real_server(settings):
    """The URL of mlx_api_server.py with the models of a configuration file."""
    command = [sys.executable, str(ROOT / "mlx_api_server.py"), "--port", "0", "--no-defaults", "--config", settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT | server_environment(), **pipes) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield next(line for line in lines if line.startswith("Serving on ")).split()[-1]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def test_it_works_with_the_real_server(scripted_path, tmp_path):
    settings = tmp_path / "models.toml"
    settings.write_text(f'[models.script]\nsource = "{scripted_path}"\ntype = "thinking"\n')
    with real_server(settings) as url:
        for how in ([], ["--stream"]):
            status, out, err = ran(url, "--model", "script", *how, "think")
            assert (status, out.strip(), err.strip()) == (0, "It is four.", "Two and two are four.")
        assert ran(url, "--load", str(scripted_path), "--key", "copy")[0] == 0
        assert [line.split("\t")[:2] for line in ran(url, "--list")[1].splitlines()] == [
            ["script", "loaded"],
            ["copy", "loaded"],
        ]
        assert ran(url, "--unload", "copy")[1].startswith("Unloaded copy: 0 requests completed, 0 aborted")
        with terminal(url, "--model", "script") as shown:
            shown.expect("> ")
            shown.type("forever\n")
            shown.expect("tick tock")
            shown.stop_answer()
            shown.expect("> ")
            shown.type("emoji\n")
            shown.expect("Family: \N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN} end")
            shown.expect("> ")
            shown.type("\x04")
            assert shown.exit_status() == 0


@pytest.mark.parametrize(("flags", "streamed"), [((), True), (("--no-stream",), None)])
def test_an_answer_is_streamed_on_a_terminal_unless_that_is_refused(server, flags, streamed):
    with terminal(server.url, "--model", "talker", *flags, "Capital?") as shown:
        shown.expect("The capital is Paris.")
        assert shown.exit_status() == 0
    assert server.requests[-1].get("stream") is streamed


def test_an_answer_is_whole_in_a_pipe(server):
    assert ran(server.url, "--model", "talker", "Capital?")[0] == 0
    assert server.requests[-1].get("stream") is None


def test_the_seconds_of_a_wait_are_shown_on_a_terminal(server):
    with terminal(server.url, "--model", "mute", "Capital?") as shown:
        shown.expect("Waiting for the answer · 0 s")
        shown.expect("Waiting for the answer · 1 s")
        shown.process.send_signal(signal.SIGINT)
        assert shown.exit_status() == 130


def test_a_silent_server_is_still_at_work_and_exit_status_3(server):
    status, out, err = ran(server.url, "--model", "mute", "--timeout", "0.7", "Capital?")
    assert (status, out) == (3, "")
    assert f"error: The server at {server.url}/v1 is still at work; it has sent nothing for 0.7 s." in err


def test_a_model_that_is_being_loaded_is_asked_before_none_is():
    cards = [
        {"id": "far", "status": {"value": "unloaded"}},
        {"id": "talker", "status": {"value": "loading"}},
        {"id": "other", "status": {"value": "unloaded"}},
    ]
    with scripted_server(cards=cards) as server:
        assert ran(server.url, "Capital?") == (0, "The capital is Paris.\n", "model: talker\n")
