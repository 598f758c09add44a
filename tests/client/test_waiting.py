"""The line that shows what an answer waits for, and what to do where no server is."""

import re

import pytest

from mlxserver.client import errors
from mlxserver.client.errors import start_hint
from mlxserver.client.events import Content, Finished, Reasoning
from mlxserver.client.models import Prefill, Progress, QueuePosition
from mlxserver.client.waiting import Waiting
from tests.support.scripted_server import scripted_server
from tools.harness.terminal import CTRL_C, terminal

OTHER = "--base-url names another one."


def test_the_line_has_what_is_waited_for_then_the_tokens_and_the_seconds_always():
    seconds = [100.0]
    waiting = Waiting(lambda: seconds[0])
    assert str(waiting) == "Waiting for the answer · 0 s"
    seconds[0] = 103.4
    waiting.take_progress(Progress("reading", 1_000_000, 4_000_000))
    assert str(waiting) == "The model is being loaded: reading, 1.0 MB of 4.0 MB · 3 s"
    waiting.take_progress(QueuePosition(2))
    assert str(waiting) == "Waiting for a free slot, number 2 in the queue · 3 s"
    waiting.take_progress(Prefill(512, 2048))
    assert str(waiting) == "The prompt is being read: 512 of 2048 tokens · 3 s"
    waiting.take(Reasoning("Hm"))
    assert str(waiting) == "about 1 token · 3 s"
    seconds[0] = 110.0
    for event in (Content("So"), Finished("stop")):
        waiting.take(event)
    assert str(waiting) == "about 2 tokens · 10 s"


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        ("mute", "Waiting for the answer", "Waiting for the answer"),
        ("ponderous", "The model is being loaded: warming up", "about 1 token"),
    ],
)
def test_the_shell_shows_the_state_of_an_answer_below_it_until_it_ends(tmp_path, model, before, after):
    """With the seconds, of which a busy machine may leave out some."""

    def seconds(text):
        found = re.search(rf"{text} · (\d+) s", shell.shown)
        return int(found[1]) if found else 0

    with scripted_server() as server, terminal("--base-url", server.url, "--model", model, home=tmp_path) as shell:
        shell.expect("\n>")
        shell.enter("Capital?")
        first = shell.until(lambda: seconds(before), before)
        server.gate.set()
        shell.until(lambda: seconds(after) > first, after)
        shell.type(CTRL_C)
        shell.expect("(stopped)")
        assert not {"Waiting", "being loaded", "about"} & {*shell.shown.split()}


@pytest.mark.parametrize(
    ("url", "is_checkout", "hint"),
    [
        ("http://127.0.0.1:8000/v1", True, "Start one with `make serve`"),
        ("http://localhost:9000/v1", True, 'Start one with `make serve ARGS="--port 9000"`'),
        ("http://[::1]:9000/v1", False, "Start one with `mlx-server --port 9000`"),
        ("http://localhost:8000/v1", False, "Start one with `mlx-server`"),
        ("https://example.org/v1", True, ""),
    ],
)  # fmt: skip
def test_the_line_that_starts_a_server_is_one_for_this_machine(monkeypatch, tmp_path, url, is_checkout, hint):
    if not is_checkout:
        monkeypatch.setattr(errors, "MAKEFILE", tmp_path / "Makefile")
    assert start_hint(url) == (f"{hint}; " if hint else "") + OTHER
