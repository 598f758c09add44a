"""Shell of advanced_client.py: a real terminal, a real server, and the text on the screen."""

import json
import signal

import pytest

from mlxserver.client.errors import SettingInvalid
from mlxserver.client.shell.settings import read_parameter
from tests.support.scripted_server import scripted_server
from tools.harness.models import scripted_model
from tools.harness.running_server import running_server
from tools.harness.scripts import Script
from tools.harness.terminal import ALT_ENTER, CTRL_C, CTRL_D, TAB, UP, terminal

PROMPT = "\n>"
SCRIPTS = {
    "hello": "Hello there, and hello there again.",
    "markdown": "# A title\n\nSome **bold** words.\n\n```python\nprint(1)\n```\n\n- first\n- second\n",
    "lines": "\n".join(f"Line {n}.\n" for n in range(60)),
    "think": "<think>\nTwo and two are four.\n</think>\n\nIt is four.",
    "forever": Script(["tick ", "tock "], endless=True),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return scripted_model(tmp_path_factory.mktemp("models") / "talker", SCRIPTS)


@pytest.fixture(scope="module")
def server(path, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "models.toml"
    fields = f'source = "{path}"\ntype = "thinking"\npreload = true\ncontext_length = {10**8}'
    sections = [f"[models.{key}]\n{fields}" for key in ("talker", "other")]
    config.write_text("\n".join(['memory_limit = "100TB"', *sections]))
    with running_server("--no-defaults", "--config", str(config)) as server:
        yield server


@pytest.fixture
def shell(server, tmp_path):
    with terminal("--base-url", server.url, "--model", "talker", home=tmp_path) as shell:
        shell.expect("/help lists the commands", PROMPT)
        yield shell


@pytest.mark.timeout(300)
def test_a_chat_sends_its_first_turn_with_the_second(tmp_path):
    """The one test with a trained model: its second answer needs the first question."""
    settings = ("--model", "smollm2", "--temperature", "0", "--max-tokens", "24")
    with (
        running_server("--no-defaults", "--model", "smollm2=embedded:smollm2") as server,
        terminal("--base-url", server.url, *settings, home=tmp_path) as shell,
    ):
        shell.expect(PROMPT)
        shell.enter("What is the capital of France?")
        shell.expect("is Paris", "smollm2 ·", "tokens", "TTFT", "context", within=100)
        shell.enter("What is the population of that city?")
        shell.expect("that city?", "Paris", "2 turns", within=100)


def test_an_answer_is_rendered_and_its_figures_are_shown(shell):
    shell.enter("show markdown")
    shell.expect("A title", "Some bold words.", "print(1)", "• first", "• second", "talker · ", "TTFT")
    assert "**" not in shell.shown


def test_an_answer_longer_than_the_screen_is_whole_in_the_scrollback(shell):
    shell.enter("many lines")
    shell.expect("Line 59.", "talker · ")
    assert [line for line in shell.shown.splitlines() if line.startswith("Line ")] == [f"Line {n}." for n in range(60)]


def test_thinking_is_shown_hidden_or_collapsed(shell):
    shell.enter("please think")
    shell.expect("Two and two are four.", "It is four.", "context")
    for view, shown in (("hide", 1), ("collapse", 1), ("show", 2)):
        shell.enter(f"/think {view}")
        shell.expect(f"Thinking: {view}.")
        shell.enter(f"please think and {view}")
        shell.expect(f"please think and {view}", "It is four.", "context")
        assert shell.shown.count("Two and two are four.") == shown
    assert shell.shown.count("thought for") == 1


def test_another_model_continues_the_conversation(shell):
    shell.enter("say hello")
    shell.expect("again.", "talker · ")
    shell.enter("/model other")
    shell.expect("Now talking to other.")
    shell.enter("say hello once more")
    shell.expect("once more", "again.", "other · ", "2 turns")
    shell.enter("/model oter")
    shell.expect("did you mean 'other'?")


def test_a_model_is_loaded_and_unloaded(shell, path):
    shell.enter(f"/load {path} third")
    shell.expect("Loaded third in")
    shell.enter("/models")
    shell.expect("key", "third", "loaded")
    shell.enter("/unload third")
    shell.expect("Unloaded third: 0 requests completed, 0 aborted")
    shell.enter("/load nowhere/at/all/x")
    shell.expect("error: ")


def test_a_load_shows_its_progress_and_its_result(tmp_path):
    with (
        scripted_server() as server,
        terminal("--base-url", server.url, "--model", "talker", home=tmp_path) as shell,
    ):
        shell.expect(PROMPT)
        shell.enter("/load org/stepwise")
        shell.expect("Loaded stepwise in 2.5 s.")
        shell.enter("/load org/plain")
        shell.expect("Loaded derived in 1.2 s.")
        shell.enter("/load org/stumbler")
        shell.expect("error: Model 'stumbler' could not be loaded: no weights.")


@pytest.mark.parametrize("view", ["show", "hide", "collapse"])
def test_an_answer_that_waits_for_its_model_shows_the_progress_of_the_load(tmp_path, view):
    arguments = ("--model", "loader", "--think", view)
    with (
        scripted_server() as server,
        terminal("--base-url", server.url, *arguments, home=tmp_path) as shell,
    ):
        shell.expect(PROMPT)
        shell.enter("Capital?")
        shell.expect("The model is being loaded: warming up")
        server.gate.set()
        shell.expect("The capital is Paris.", "loader · ")
        assert "being loaded" not in shell.shown


@pytest.mark.parametrize(
    ("model", "outcome"), [("ponderous", "(stopped)"), ("stumbler", "error: The answer broke off")]
)
def test_the_progress_of_a_load_is_removed_when_the_answer_stops_or_fails(tmp_path, model, outcome):
    with (
        scripted_server() as server,
        terminal("--base-url", server.url, "--model", model, "--think", "hide", home=tmp_path) as shell,
    ):
        shell.expect(PROMPT)
        shell.enter("Capital?")
        shell.expect("The model is being loaded: warming up")
        if model == "stumbler":
            server.gate.set()
        else:
            shell.type(CTRL_C)
        shell.expect(outcome, PROMPT)
        assert "being loaded" not in shell.shown


def test_a_comparison_shows_the_progress_of_the_load_that_a_column_waits_for(tmp_path):
    with (
        scripted_server() as server,
        terminal("--base-url", server.url, "--compare", "talker,loader", "Capital?", home=tmp_path) as shown,
    ):
        shown.expect("The capital is Paris.", "warming up")
        server.gate.set()
        assert shown.exit_status() == 0
        assert "warming up" not in shown.shown
        assert shown.shown.count("The capital is Paris.") == 2


def test_models_are_compared_side_by_side(shell):
    shell.enter("/compare talker,other,absent please think")
    shell.expect("talker", "other", "absent", "Two and two are four.", "error: Model 'absent' does not", "It is four.")
    shell.expect("finish reason", "talker", "stop", "other", "stop", "absent", "failed")


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(shell, tmp_path):
    shell.enter("go on forever")
    shell.expect("tick tock tick tock")
    shell.type(CTRL_C)
    shell.expect("(stopped)", PROMPT)
    shell.enter("say hello")
    shell.expect("again.", "2 turns")
    shell.enter(f"/save {tmp_path}/kept.json")
    shell.expect("Saved 2 turns")
    messages = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert messages[1]["content"].startswith("tick tock")
    assert messages[3]["content"] == SCRIPTS["hello"]


def test_an_unknown_command_suggests_the_nearest(shell):
    shell.enter("/modles")
    shell.expect("error: command: '/modles' is not valid; expected one that exists; did you mean '/models'?")
    shell.enter("/xyzzy")
    shell.expect("expected one of: /models, ")


def test_a_server_killed_during_an_answer_does_not_end_the_shell(path, tmp_path):
    with (
        running_server("--no-defaults", "--model", f"talker={path}") as server,
        terminal("--base-url", server.url, home=tmp_path) as shell,
    ):
        shell.expect(PROMPT)
        shell.enter("go on forever")
        shell.expect("tick tock tick tock")
        server.process.send_signal(signal.SIGKILL)
        shell.expect("error: The answer broke off: the connection was lost")
        shell.enter("/retry")
        shell.expect("error: No answer from a server at", "Connection refused")
        shell.enter("/help")
        shell.expect("the server's models")
        shell.type(CTRL_D)
        assert shell.exit_status() == 0


def test_a_conversation_is_changed_by_commands(shell, tmp_path):
    (tmp_path / "notes.txt").write_text("say hello to ``` these")
    shell.enter("/system Be brief.")
    shell.expect("The system message is set.")
    shell.enter(f"/file {tmp_path}/notes.txt")
    shell.expect("goes with the next question.", "1 file attached")
    shell.enter("What is in it?")
    shell.expect("again.", "1 turn")
    shell.enter("/retry")
    shell.expect("/retry", "again.", "1 turn")
    shell.enter("please think")
    shell.expect("It is four.", "2 turns")
    shell.enter("/undo")
    shell.expect("Forgotten: please think", "1 turn")
    shell.enter(f"/save {tmp_path}/talk.md")
    shell.expect("Saved 1 turn")
    shell.enter("/new")
    shell.expect("A new conversation.", "0 turns")
    shell.enter(f"/open {tmp_path}/talk.md")
    shell.expect("Opened 1 turn", "1 turn")
    shell.enter(f"/save {tmp_path}/talk.json")
    shell.expect("talk.json.")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "notes.txt:\n````\nsay hello to ``` these\n````\n\nWhat is in it?"


def test_settings_are_listed_and_invalid_ones_refused(shell):
    shell.enter("/set")
    shell.expect("Nothing is set.")
    shell.enter("/set temperature 0.7")
    shell.expect("temperature = 0.7")
    shell.enter("/set max_tokens 2")
    shell.expect("max_tokens = 2")
    shell.enter("say hello")
    shell.expect("Hello there,", "reached its limit of tokens")
    shell.enter("/set model x")
    shell.expect("error: parameter: 'model'")
    shell.enter("/stream off")
    shell.expect("Streaming is off.")
    shell.enter("/stream perhaps")
    shell.expect("error: /stream: 'perhaps' is not valid; expected on or off.")
    shell.enter("say hello again")
    shell.expect("hello again", "Hello there,", "talker · 2 tokens")
    shell.enter("/stats")
    shell.expect("answers", "talker", "2")


def test_lines_are_edited_completed_and_kept_between_runs(server, tmp_path):
    arguments = ("--base-url", server.url, "--model", "talker")
    with terminal(*arguments, home=tmp_path) as shell:
        shell.expect(PROMPT)
        shell.type("/mod" + TAB)
        shell.expect("/models", "/model")
        shell.type(CTRL_C)
        shell.type("/model oth" + TAB)
        shell.expect("/model other")
        shell.enter("")
        shell.expect("Now talking to other.")
        shell.type("say" + ALT_ENTER + "hello")
        shell.enter("")
        shell.expect("again.", "other · ")
        shell.enter("/quit")
        assert shell.exit_status() == 0
    with terminal(*arguments, home=tmp_path) as shell:
        shell.expect(PROMPT)
        shell.type(UP + UP)
        shell.expect("> say", "hello")


def test_input_during_an_answer_is_the_next_line(shell):
    shell.enter("many lines")
    shell.expect("Line 1.")
    shell.enter("/model other")
    shell.expect("Line 59.", "Now talking to other.")


def test_a_small_benchmark_runs_in_the_shell(shell):
    shell.enter("/bench talker --concurrency 1,2 --requests 2 --warmup 0 --seed 3")
    shell.expect("c=1", "c=2", "TTFT ms, p50 / p95 / p99", "errors", "tokens/s in total", "end-to-end latency")
    shell.enter("/bench talker --speed 3")
    shell.expect("error: /bench: ", "unrecognized arguments: --speed 3")


def test_a_parameter_is_json_or_a_text():
    assert read_parameter("temperature", "0.5") == {"temperature": 0.5}
    assert read_parameter("stop", '["a"]') == {"stop": ["a"]}
    assert read_parameter("stop", "a b") == {"stop": "a b"}
    for own in ("stream", "messages", "not a name", ""):
        with pytest.raises(SettingInvalid):
            read_parameter(own, "1")
