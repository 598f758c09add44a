"""Some seconds of what `make soak` does for minutes."""

import re
import subprocess
import sys

from tools import soak
from tools.harness.running_server import ROOT


def test_a_short_soak_keeps_every_promise(capsys):
    """Of the memory it sees only gross faults: in so short a time the process has not settled."""
    assert soak.main(["--minutes", "0.1", "--growth", "1.5"]) == 0, capsys.readouterr().out


def test_a_soak_that_is_stopped_tells_what_it_has_seen():
    command = [sys.executable, "-m", "tools.soak", "--minutes", "0.1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        lines = iter(running.stdout.readline, "")
        assert any(line.startswith("part 1/") for line in lines)
        running.terminate()
        said = "".join(lines)
    assert running.returncode == soak.STOPPED
    assert "all: " in said
    assert re.search(r"^ *\d+  \w+ 200$", said, re.MULTILINE), said
