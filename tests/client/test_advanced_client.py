"""advanced_client.py without a terminal: its output for programs, and its exit statuses."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import advanced_client
from tests.support.scripted_server import scripted_server
from tools.harness.terminal import SETTINGS, terminal

ROOT = Path(__file__).parent.parent.parent
QUICK = ("--requests", "3", "--concurrency", "1,2", "--warmup", "1")


@pytest.fixture(scope="module")
def server():
    with scripted_server() as server:
        yield server


@pytest.fixture
def main(server, monkeypatch, capsys):
    """A run in this process: (exit status, stdout, stderr)."""

    def run_main(*arguments, piped="", url=server.url):
        monkeypatch.setattr("sys.argv", ["advanced_client.py", "--base-url", url, *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        try:
            status = advanced_client.main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run_main


def test_it_runs_as_a_process_with_settings_from_the_environment(server):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, str(ROOT / "advanced_client.py"), "--model", "talker", "Capital?"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "secret"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "The capital is Paris.\n", "")


def test_the_usage_names_the_program_that_was_started(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/mlx-shell", "--help"])
    with pytest.raises(SystemExit):
        advanced_client.main()
    assert capsys.readouterr().out.startswith("usage: mlx-shell ")


def test_one_answer_is_plain_text_or_json(main):
    assert main("--model", "thinker", "17 + 25?") == (0, "42\n", "17 + 25 is 42\n")
    assert main("--model", "thinker", "--think", "hide", "--stream", "off", "17 + 25?") == (0, "42\n", "")
    status, out, _ = main("--model", "thinker", "--json", "17 + 25?")
    answer = json.loads(out)
    assert status == 0
    assert (answer["content"], answer["reasoning_content"], answer["finish_reason"]) == (
        "42\n\n",
        "17 + 25 is 42",
        "stop",
    )
    assert answer["usage"]["cached_tokens"] == 2


def test_options_files_and_conversations_become_the_request(main, server, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "before.json").write_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]')
    options = ("--system", "Brief.", "--set", "top_k=3", "--set", "stop=x", "--temperature", "0.5", "--max-tokens", "7")
    files = ("--file", f"{tmp_path}/a.txt", "--open", f"{tmp_path}/before.json", "--save", f"{tmp_path}/after.md")
    assert main("--model", "talker", *options, *files, "And?")[0] == 0
    request = server.requests[-1]
    assert {name: request[name] for name in ("top_k", "stop", "temperature", "max_tokens")} == {
        "top_k": 3,
        "stop": "x",
        "temperature": 0.5,
        "max_tokens": 7,
    }
    assert [message["content"] for message in request["messages"]] == [
        "Brief.",
        "Hi",
        "Ho",
        "a.txt:\n```\ntext\n```\n\nAnd?",
    ]
    assert (tmp_path / "after.md").read_text().endswith("## assistant\n\nThe capital is Paris.\n\n")


def test_models_are_listed_loaded_and_unloaded(main):
    assert [line.split("\t")[0] for line in main("--models")[1].splitlines()] == ["sleeper", "talker"]
    assert [card["id"] for card in json.loads(main("--models", "--json")[1])] == ["sleeper", "talker"]
    assert main("--load", "org/stepwise") == (0, "Loaded stepwise in 2.5 s.\n", "")
    assert main("--load", "org/new", "--key", "new") == (0, "Loaded new in 1.2 s.\n", "")
    assert json.loads(main("--load", "org/new", "--json")[1])["memory_bytes"] == 7
    assert json.loads(main("--unload", "talker", "--json")[1])["completed_requests"] == 3


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("org/stumbler", "Model 'stumbler' could not be loaded: no weights."),
        ("org/broken", "Model 'broken' could not be loaded: no weights."),
        ("org/leaver", "The answer broke off: the load ended without a result."),
    ],
)
def test_a_failed_load_is_the_servers_message(main, source, error):
    assert main("--load", source) == (1, "", f"error: {error}\n")


def test_models_are_compared_and_a_failure_is_shown_in_its_place(main):
    status, out, _ = main("--compare", "talker,breaker", "--json", "Hi")
    one, other = json.loads(out)
    assert status == 1
    assert (one["content"], one["error"], one["usage"]["completion_tokens"]) == ("The capital is Paris.", None, 4)
    assert (other["content"], other["error"]) == ("The cap", "The answer broke off: The engine stopped.")
    status, out, _ = main("--compare", "thinker,talker", "--markdown", "--sequential", piped="Hi")
    assert status == 0
    assert out.startswith(
        "## thinker\n\n> 17 + 25 is 42\n\n42\n\n## talker\n\nThe capital is Paris.\n\n| model | TTFT ms |"
    )
    status, out, _ = main("--compare", "talker,brief", "Hi")
    assert out.startswith("[talker]\nThe capital is Paris.\n\n[brief]\nYes\n\nmodel\tTTFT ms\ttokens")
    assert [line.split("\t")[2] for line in out.splitlines()[-2:]] == ["4", "-"]


def test_a_benchmark_gives_a_table_and_files(main, tmp_path):
    files = (
        "--output",
        f"{tmp_path}/figures.csv",
        "--plot",
        f"{tmp_path}/figures.png",
        "--slo",
        "ttft=60000,e2e=60000",
    )
    status, out, _ = main("--benchmark", "talker,thinker", *QUICK, *files)
    assert status == 0
    table = {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()}
    assert table[""] == ["talker c=1", "talker c=2", "thinker c=1", "thinker c=2"]
    assert (table["requests"], table["errors"]) == (["3"] * 4, ["0"] * 4)
    assert all(cell.endswith("(100%)") for cell in table["goodput, requests/s"])
    with (tmp_path / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["12"] * 4
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_can_send_at_a_rate_and_counts_errors(main, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "A"}]}\n{"prompt": "B"}\n')
    options = ("--prompt-file", f"{tmp_path}/prompts.jsonl", "--rate", "500", "--requests", "4", "--warmup", "0")
    status, out, err = main("--benchmark", "breaker", *options, "--json")
    level = json.loads(out)["levels"][0]
    assert (status, level["errors"], level["rate"], level["ttft_p50_ms"]) == (1, 4, 500.0, None)
    assert err == "breaker 500/s: 4 x The answer broke off: The engine stopped.\n"


def test_a_benchmark_sends_every_prompt_before_it_repeats_one(main, server, tmp_path):
    (tmp_path / "prompts.txt").write_text("A\n\nB\nC\n")
    options = ("--prompt-file", f"{tmp_path}/prompts.txt", "--concurrency", "1", "--requests", "6", "--warmup", "0")
    asked = []
    for seed in ("1", "1", "2"):
        before = len(server.requests)
        assert main("--benchmark", "talker", *options, "--seed", seed)[0] == 0
        asked.append([request["messages"][0]["content"] for request in server.requests[before:]])
    assert asked[0] == asked[1] != asked[2]
    assert all(sorted(order[:3]) == sorted(order[3:]) == ["A", "B", "C"] for order in asked)


def test_interference_has_a_phase_per_kind_of_work(main):
    status, out, _ = main("--interference", "talker,thinker", "--requests", "2", "--json")
    phases = json.loads(out)
    assert [phase["phase"] for phase in phases] == [
        "alone",
        "thinker decodes",
        "thinker prefills a long prompt",
        "thinker is being loaded",
    ]
    assert [phase["ratios"]["ttft_p50_ms"] is None for phase in phases] == [False, False, False, True]
    assert (status, phases[3]["problem"]) == (1, "Model 'thinker' does not exist. Known models: sleeper, talker.")
    assert main("--interference", "talker", "--requests", "2")[0] == 2
    for name, value in (("--rate", "5"), ("--plot", "a.png")):
        status, _, err = main("--interference", "talker,thinker", name, value)
        assert (status, err.startswith(f"error: {name}: 'with --interference'")) == (2, True)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_interference_is_written_to_a_file(main, tmp_path, suffix):
    path = tmp_path / f"figures.{suffix}"
    assert main("--interference", "thinker,talker", "--requests", "2", "--output", str(path))[0] == 0
    with path.open() as file:
        phases = json.load(file) if suffix == "json" else list(csv.DictReader(file))
    assert [phase["phase"] for phase in phases][0::3] == ["alone", "talker is being loaded"]
    if suffix == "csv":
        assert all(float(phase["ttft_p50_ms"]) > 0 and float(phase["ttft_p50_ms_ratio"]) > 0 for phase in phases)


def test_load_and_unload_are_not_supported_by_a_server_without_them(main):
    with scripted_server(has_extensions=False) as server:
        assert "does not support /models/load" in main("--load", "org/x", url=server.url)[2]
        assert "does not support /models/unload" in main("--unload", "talker", url=server.url)[2]


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (("--model", "unknown", "Hi"), 1, "Model 'unknown' does not exist."),
        (("--benchmark", "unknown", *QUICK), 1, "Model 'unknown' does not exist."),
        (("--benchmark", "talker", "--prompt-file", "/nowhere"), 1, "/nowhere: No such file or directory."),
        (("--benchmark", "talker", "--output", "x.txt"), 2, "expected a name that ends in .json or .csv."),
        (("--benchmark", "talker", "--plot", "x.svg"), 2, "expected a name that ends in .png."),
        (("--benchmark", "talker", "--slo", "speed=3"), 2, "expected milliseconds such as"),
        (("--benchmark", "talker", "--concurrency", "0"), 2, "expected a number above 0"),
        (("--benchmark", "talker", "--rate", "1", "--concurrency", "1"), 2, "expected one of the two."),
        (("--benchmark", ","), 2, "expected keys of models between commas."),
        (("--model", "talker", "--open", "x.pdf", "Hi"), 2, "expected a name that ends in .json or .md."),
        (("--model", "talker", "--file", "/nowhere", "Hi"), 1, "/nowhere: No such file or directory."),
        (("--set", "model=x", "Hi"), 2, "parameter: 'model' is not valid"),
        (("--models", "Hi"), 2, "a PROMPT can't be given with"),
        (("--key", "x"), 2, "--key belongs to --load"),
    ],
)
def test_a_failure_is_one_line_on_stderr_and_an_exit_status(main, arguments, status, error):
    ended, out, err = main(*arguments)
    assert (ended, out) == (status, "")
    assert error in err


def test_a_broken_answer_keeps_what_came(main):
    status, out, err = main("--model", "cutter", "Hi")
    assert (status, out) == (1, "The cap\n")
    assert err.startswith("error: The answer broke off: the connection was lost")


def test_a_missing_server_is_exit_status_3(main):
    assert main("--models", url="http://127.0.0.1:1")[0] == 3


def test_the_shell_needs_a_terminal_and_a_server(server, tmp_path):
    with terminal("--base-url", "http://127.0.0.1:1", home=tmp_path) as shown:
        assert shown.exit_status() == 3
        assert "error: No answer from a server at http://127.0.0.1:1/v1" in shown.shown
    with terminal("--base-url", server.url, "--compare", "talker,thinker", "Hi", home=tmp_path) as shown:
        assert shown.exit_status() == 0
        shown.expect("talker", "thinker", "The capital is Paris.", "finish reason")


def test_no_color_means_no_escape_sequences(server, tmp_path):
    with terminal("--base-url", server.url, "--models", home=tmp_path, NO_COLOR="1") as shown:
        shown.child.expect("talker")
        assert "\x1b" not in shown.child.before
